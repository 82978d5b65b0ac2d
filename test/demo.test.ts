/** `npm run demo`, with every setting left out once. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { demo } from "./run/demo.ts";
import { readTemplate, runCommandLine } from "./support/server.ts";

const README = readTemplate("README.md");
const [, TROUBLESHOOTING = ""] = README.split("\n## Troubleshooting\n");

/** The part of the troubleshooting that names this demo has to quote the screen, and link to what mends it. */
function assertReadmeAgrees(demoArguments: string, output: string): void {
  const section = TROUBLESHOOTING.split(/^(?=### |\| )/m).find((part) => part.includes(`${demoArguments}\``)) ??
    assert.fail(`The README does not say how to reproduce ${demoArguments}`);
  const [heading = ""] = section.replace("### ", "").split("\n");
  const quoted = [...section.replaceAll("\n", " ").matchAll(/(?<=[ (])_([^_]+)_|`([^`]+)`/g)].map(([, a, b]) => a ?? b);
  const words = [heading, ...quoted].map((one = "") => one.replace(/^npm .*|(…|https:).*/, "").toLowerCase());
  assert.ok(words.some((one) => one.length > 7 && output.toLowerCase().includes(one)), heading);

  const [, mendedBy = ""] = /Mended by +README, (.*)/.exec(output) ?? [];
  const step = README.split(/^(?=#{2,3} )/m).find((part) => new RegExp(`^#+ ${mendedBy}\\b`).test(part)) ??
    assert.fail(`The README has no heading ${mendedBy}`);
  const anchors = [...step.matchAll(/^#+ (.*)$/gm)].map(([, text = ""]) =>
    `(#${text.toLowerCase().replace(/[^\w -]/g, "").replaceAll(" ", "-")})`
  );
  assert.ok(anchors.some((anchor) => section.includes(anchor)), `${heading} does not link to ${mendedBy}`);
}

/** Runs the demo in the process of the test. */
async function runDemo(...args: string[]) {
  const printed: string[] = [];
  const status = await demo(args, (line) => printed.push(line));
  return { status, stdout: printed.join("\n") };
}

for (const kind of ["permissive", "strict"]) {
  test(`the demo shows all nine hops on a ${kind} tenant, and no token`, async () => {
    const { status, stdout } = await runDemo("--tenant", kind);
    assert.equal(status, 0);
    assert.match(stdout, new RegExp(`stand-in, ${kind}`));
    for (let hop = 1; hop <= 9; hop++) assert.match(stdout, new RegExp(`^  ${hop} `, "m"));
    assert.match(stdout, /each sees only their own tasks/);
    assert.equal(/scopes: 1 of 1 asked for/.test(stdout), kind === "strict");
    assert.equal(/One scope, offline_access, .* OpenID Connect scopes/s.test(stdout), kind === "strict");
    assert.doesNotMatch(stdout, /eyJ/); // how a JWT begins
  });
}

const SETTINGS = [...(await runDemo("--break")).stdout.matchAll(/^ +(\S+)/gm)].map(([, name = ""]) => name);

test("the README names every setting that --break can leave out, and no other", () => {
  const named = [...README.matchAll(/--break ([a-z-]+)/g)].map(([, name = ""]) => name);
  assert.deepEqual([...new Set(named)].sort(), SETTINGS.toSorted());
});

for (
  const demoArguments of [...SETTINGS.map((name) => `--break ${name}`), "--break default-audience --tenant strict"]
) {
  test(`${demoArguments} shows what is expected, as the README quotes it, and the step that mends it`, async () => {
    const { status, stdout } = await runDemo(...demoArguments.split(" "));
    assert.equal(status, 0, stdout);
    assertReadmeAgrees(demoArguments, stdout);
  });
}

test("without a Default Audience a strict client is refused, a permissive one gets an encrypted token", async () => {
  const symptom = async (kind: string) =>
    /Symptom +(.*)/.exec((await runDemo("--break", "default-audience", "--tenant", kind)).stdout)?.[1] ?? "";
  assert.match(
    await symptom("strict"),
    /Oops!.*The userinfo audience is not allowed for third party clients\. Please /,
  );
  assert.match(await symptom("permissive"), /^401 .*encrypted \(a JWE of 5 parts\)/);
});

test("--break offline-access on a strict tenant is a scope mismatch that leads to API Settings", async () => {
  const { status, stdout } = await runDemo("--break", "offline-access", "--tenant", "strict");
  assert.equal(status, 0, stdout);
  assert.match(stdout, /Symptom +OAUTH_SCOPES_MISMATCH.*offline_access/);
  const section = TROUBLESHOOTING.split("\n").find((row) => row.startsWith("| `OAUTH_SCOPES_MISMATCH`"));
  assert.match(section ?? "", /strict.*\(#api-settings\)/s);
});

test("--break alone lists the settings, each on an indented line that begins with its name", async () => {
  const { status, stdout } = await runDemo("--break");
  assert.equal(status, 0);
  assert.match(stdout, /^ {2}registration +Dynamic Client Registration is off/m);
  assert.match(stdout, /^ {2}oidc +\S.* \(strict tenant\)$/m);
});

test("--break with an unknown setting lists the known ones and exits 1", async () => {
  const { status, stdout, stderr } = await runCommandLine("demo", ["--break", "constructor"]).outcome;
  assert.equal(status, 1);
  assert.match(stdout, /^ +connection /m);
  assert.equal(stderr, "Unknown setting: constructor. The known ones are above\n");
});

test("the demo refuses the other tenant's setting, and unknown tenants and arguments, in one line", async () => {
  const refused: [string[], RegExp][] = [
    [["--break", "oidc", "--tenant", "permissive"], /^--break oidc is about a strict tenant/],
    [["--tenant", "lenient"], /^--tenant must be permissive or strict$/],
    [["--brake", "action"], /^Unknown option '--brake': --help shows the options$/],
    [["action"], /^Unexpected argument 'action': --help shows the options$/],
  ];
  for (const [args, message] of refused) await assert.rejects(runDemo(...args), { message });
});

test("npm run demo -- --help names every option", async () => {
  const { status, stdout } = await runDemo("--help");
  assert.equal(status, 0);
  for (const option of ["--tenant", "--break", "--help"]) {
    assert.match(stdout, new RegExp(`^  ${option} `, "m"));
  }
});

test("npm run demo exits 0 after what the README quotes, without colours away from a terminal", async () => {
  const { status, stdout, stderr } = await runCommandLine("demo").outcome;
  assert.deepEqual([status, stderr], [0, ""]);
  const [, quoted = assert.fail()] = /You should see\*\* `(Two users [^`]*)`/.exec(README) ?? [];
  assert.ok(stdout.includes(quoted), stdout);
  assert.ok(!stdout.includes("\x1b"));
});
