/** `npm run demo` as a user runs it, with every setting left out once. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { RUNTIME_FLAGS } from "./support/server.ts";

/** What the screen must show of each setting: the words of the README's troubleshooting, and the step. */
const SYMPTOMS: Record<string, { symptom: RegExp; step: string }> = {
  "registration": { symptom: /Dynamic client registration is disabled/, step: "Step 2" },
  "application-limit": { symptom: /You reached the limit of entities of this type/, step: "Step 2" },
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
  "cimd-import": { symptom: /Unknown client: http.*\/client\.json/, step: "Step 2" },
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

/** On the runtime and with the loader that run this file. */
function run(...args: string[]): Promise<{ status: number; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    execFile(
      process.execPath,
      [...RUNTIME_FLAGS, `${import.meta.dirname}/run/demo.ts`, ...args],
      (error, stdout, stderr) => resolve({ status: Number(error?.code ?? 0), stdout, stderr }),
    );
  });
}

describe("npm run demo", { concurrency: 2 }, () => {
  for (const kind of ["permissive", "strict"]) {
    test(`shows all nine hops on a ${kind} tenant, no token and, away from a terminal, no colour`, async () => {
      const { status, stdout, stderr } = await run("--tenant", kind);
      assert.equal(status, 0, stderr);
      assert.match(stdout, new RegExp(`stand-in, ${kind}`));
      for (let hop = 1; hop <= 9; hop++) assert.match(stdout, new RegExp(`^  ${hop} `, "m"));
      assert.match(stdout, /each sees only their own tasks/);
      assert.doesNotMatch(stdout, /eyJ/); // how a JWT begins
      assert.ok(!stdout.includes("\x1b"));
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

  test("an unknown argument or tenant exits 1", async () => {
    assert.equal((await run("--tenant", "lenient")).status, 1);
    assert.equal((await run("--brake", "action")).status, 1);
  });
});
