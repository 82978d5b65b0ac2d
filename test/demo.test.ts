/** `npm run demo`, with every setting left out once. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { demo } from "./run/demo.ts";
import { runCommandLine } from "./support/server.ts";

/** What the screen must show of each setting: the words of the README's troubleshooting, and the step. */
const SYMPTOMS: Record<string, { symptom: RegExp; step: string }> = {
  "registration": {
    symptom: /Dynamic client registration is disabled/,
    step: "Enable client registration",
  },
  "application-limit": {
    symptom: /You reached the limit of entities of this type/,
    step: "Enable client registration",
  },
  "default-audience": { symptom: /401 .*encrypted \(a JWE of 5 parts\)/, step: "Step 2" },
  "api-identifier": { symptom: /Service not found: http:\/\/localhost:\d+\/mcp$/m, step: "Step 1" },
  "offline-access": { symptom: /No refresh token/, step: "Step 1" },
  "connection": { symptom: /no connections enabled for the client/, step: "Step 3" },
  "action": { symptom: /OAUTH_SCOPES_MISMATCH.*Not all requested permissions were granted/, step: "Step 4" },
  "default-permissions": {
    symptom: /Client "tpc_.*" is not authorized to access resource server/,
    step: "Step 1",
  },
  "oidc": { symptom: /OAUTH_OWNER_PROFILE_ID_MISSING/, step: "Step 7" },
  "cimd-import": {
    symptom: /Unknown client: http.*\/client\.json/,
    step: "Enable client registration",
  },
  "issuer-response": {
    symptom: /has the iss \(none\), expected http:\/\/localhost:\d+\/$/m,
    step: "Enable client registration",
  },
  "callback": { symptom: /Callback URL mismatch: https:\/\/chatgpt\.com\/connector/, step: "Step 5" },
  "rotation": { symptom: /Unknown or invalid refresh token/, step: "Step 5" },
  "bot-rule": { symptom: /Expected 401, got 403/, step: "Step 0" },
  "server-url": { symptom: /401 .*expected http:\/\/localhost:\d+\/mcp\/v2/, step: "Step 0" },
  "issuer": { symptom: /401 .*issuer http:\/\/localhost.*expected http:\/\/127\.0\.0\.1/, step: "Step 0" },
  "signing-keys": { symptom: /503 .*signing keys cannot be had/, step: "Step 0" },
  "permissions": { symptom: /insufficient_scope.*tasks:write/, step: "Permissions per tool" },
};

const [, TROUBLESHOOTING = ""] = readFileSync(new URL("../README.md", import.meta.url), "utf8").split(
  "\n## Troubleshooting\n",
);

/** The README's troubleshooting section that is reproduced with this setting must fit what the screen shows. */
function assertReadmeAgrees(setting: string, output: string): void {
  const section = TROUBLESHOOTING.split(/^### /m).find((part) => part.includes(`--break ${setting}\``)) ??
    assert.fail(`The README does not say how to reproduce ${setting}`);
  const [heading = ""] = section.split("\n");
  const quoted = [...section.replaceAll("\n", " ").matchAll(/(?<=[ (])_([^_]+)_|`([^`]+)`/g)].map((
    [, a, b],
  ) => a ?? b ?? "");
  const isShown = (words: string) =>
    words.length > 7 && output.toLowerCase().includes((words.split("…")[0] ?? "").toLowerCase());
  assert.ok([heading, ...quoted.filter((words) => !words.startsWith("npm "))].some(isShown), heading);

  const [, mendedBy = ""] = /Mended by +README, (.*)/.exec(output) ?? [];
  const anchor = mendedBy.split(", ").at(-1)?.toLowerCase().replace(/[^a-z0-9 -]/g, "").replaceAll(" ", "-");
  assert.ok(section.includes(`(#${anchor})`), `${heading} does not link to ${mendedBy}`);
}

/** In this process. */
async function run(...args: string[]) {
  const printed: string[] = [];
  const complaints: string[] = [];
  const status = await demo(args, (line) => printed.push(line), (line) => complaints.push(line));
  return { status, stdout: printed.join("\n"), stderr: complaints.join("\n") };
}

for (const kind of ["permissive", "strict"]) {
  test(`the demo shows all nine hops on a ${kind} tenant, and no token`, async () => {
    const { status, stdout, stderr } = await run("--tenant", kind);
    assert.equal(status, 0, stderr);
    assert.match(stdout, new RegExp(`stand-in, ${kind}`));
    for (let hop = 1; hop <= 9; hop++) assert.match(stdout, new RegExp(`^  ${hop} `, "m"));
    assert.match(stdout, /each sees only their own tasks/);
    assert.doesNotMatch(stdout, /eyJ/); // how a JWT begins
  });
}

for (const [setting, { symptom, step }] of Object.entries(SYMPTOMS)) {
  test(`--break ${setting} shows its symptom and the step that mends it`, async () => {
    const { status, stdout, stderr } = await run("--break", setting);
    assert.equal(status, 0, stdout + stderr);
    assert.match(stdout, symptom);
    assert.match(stdout, new RegExp(`Mended by .*${step}`));
    assertReadmeAgrees(setting, stdout);
  });
}

test("--break offline-access on a strict tenant is a mismatch of scopes, and the README sends on to API Settings", async () => {
  const { status, stdout } = await run("--break", "offline-access", "--tenant", "strict");
  assert.equal(status, 0, stdout);
  assert.match(stdout, /Symptom +OAUTH_SCOPES_MISMATCH.*offline_access/);
  const section = TROUBLESHOOTING.split(/^### /m).find((part) => part.startsWith("OAUTH_SCOPES_MISMATCH"));
  assert.match(section ?? "", /strict.*\(#api-settings\)/s);
});

test("--break alone lists the settings, one an indented line, name first", async () => {
  const { status, stdout } = await run("--break");
  assert.equal(status, 0);
  assert.deepEqual([...stdout.matchAll(/^ +(\S+)/gm)].map(([, name]) => name), Object.keys(SYMPTOMS));
});

test("an unknown setting lists the known ones and exits 1", async () => {
  for (const setting of ["nonsense", "constructor"]) {
    const { status, stdout, stderr } = await run("--break", setting);
    assert.equal(status, 1);
    assert.match(stdout, /^ +connection /m);
    assert.match(stderr, new RegExp(`Unknown setting: ${setting}`));
  }
});

test("a setting of the other kind of tenant exits 1 and says why", async () => {
  const { status, stderr } = await run("--break", "oidc", "--tenant", "permissive");
  assert.equal(status, 1);
  assert.match(stderr, /oidc is about a strict tenant/);
});

test("an unknown argument or tenant exits 1 and says which are known", async () => {
  const tenant = await run("--tenant", "lenient");
  assert.deepEqual([tenant.status, tenant.stderr], [1, "--tenant must be permissive or strict"]);
  const argument = await run("--brake", "action");
  assert.equal(argument.status, 1);
  assert.match(argument.stderr, /Unknown argument: action brake\. --help/);
});

test("--help says what the demo does and every option", async () => {
  const { status, stdout } = await run("--help");
  assert.equal(status, 0);
  for (const option of ["--tenant", "--break", "--help"]) {
    assert.match(stdout, new RegExp(`^  ${option} `, "m"));
  }
});

test("the command line exits 0 after the demo, uncoloured away from a terminal", async () => {
  const { status, stdout, stderr } = await runCommandLine("demo").outcome;
  assert.deepEqual([status, stderr], [0, ""]);
  assert.match(stdout, /^Summary\n/m);
  assert.ok(!stdout.includes("\x1b"));
});

test("the command line exits 1 for what it does not know", async () => {
  const { status, stderr } = await runCommandLine("demo", ["--break", "nonsense"]).outcome;
  assert.equal(status, 1);
  assert.match(stderr, /Unknown setting: nonsense/);
});
