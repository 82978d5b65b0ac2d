/** What the README says is so: its links, names and commands exist, and its code runs as it stands there. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { cp, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { runInNewContext } from "node:vm";
import { freePort, post, RUNTIME_FLAGS, startServer } from "./support/server.ts";
import { ALICE, configuredTenant, startTenant } from "./support/tenant.ts";

const ROOT = join(import.meta.dirname, "..");
const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
const README = read("README.md");
const SCRIPTS = Object.keys(JSON.parse(read("package.json")).scripts);

/** The code blocks of a language, or those among them that hold a text. */
function blocks(language: string, holding = ""): string[] {
  const all = [...README.matchAll(/^ *```(\w+)\n(.*?)^ *```$/gms)];
  return all.filter(([, name, code]) => name === language && code?.includes(holding)).map(([, , code]) =>
    code ?? ""
  );
}

function section(heading: string): string {
  const [, text = ""] = README.split(new RegExp(`^##+ ${heading}\n`, "m"));
  return text.split(/^##/m)[0] ?? "";
}

/** The first column of a section's table. */
function firstColumn(heading: string): string[] {
  return [...section(heading).matchAll(/^\| *(`.*?)\|/gm)].flatMap(([, cell = ""]) =>
    [...cell.matchAll(/`([^`]+)`/g)].map(([, name = ""]) => name)
  );
}

async function temporaryDirectory(t: TestContext): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), "readme-"));
  t.after(() => rm(directory, { recursive: true }));
  return directory;
}

test("every link leads to a heading or a file that exists", () => {
  const headings = [...README.matchAll(/^#+ (.*)$/gm)].map(([, text = ""]) =>
    `#${text.toLowerCase().replace(/[^\w -]/g, "").replaceAll(" ", "-")}`
  );
  const links = [...README.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
  assert.ok(links.length > 50);
  for (const link of links.filter((link) => !link.startsWith("https://"))) {
    assert.ok(link.startsWith("#") ? headings.includes(link) : existsSync(join(ROOT, link)), link);
  }
});

test("every npm script that is named exists, and every script is named", () => {
  const named = [...README.matchAll(/\bnpm (?:run )?(start|test|(?<=run )[a-z]+)/g)].map(([, name]) => name);
  assert.deepEqual([...new Set(named)].sort(), [...SCRIPTS].sort());
});

test("every file that is named exists, but for those of the reader's own", () => {
  const own = ["tasks.db", "client.json", "jwks.json"];
  const named = [...README.matchAll(/\b(?:test\/)?[\w.-]+\.(?:ts|js|json|db)\b/g)].map(([name]) => name);
  assert.deepEqual(
    [...new Set(named)].filter((name) => !own.includes(name) && !existsSync(join(ROOT, name))),
    [],
  );
});

test("the table of the environment names the settings that the server reads, and the example file too", () => {
  const server = read("server.ts");
  const [, schema = ""] = /^const environment = z\.object\(\{\n(.*?)^\}\);/ms.exec(server) ?? [];
  const settings = [...schema.matchAll(/^ {2}([A-Z0-9_]+):/gm)].map(([, name = ""]) => name);
  const capitals = firstColumn("Environment").filter((name) => /^[A-Z0-9_]+$/.test(name));
  assert.deepEqual(capitals.sort(), settings.sort());

  const example = [...read(".env.example").matchAll(/^#? ?([A-Z0-9_]+)=/gm)].map(([, name = ""]) => name);
  assert.deepEqual(example.sort(), [...settings, "AUTH0_CLIENT_ID", "AUTH0_CLIENT_SECRET"].sort());
});

test("the table of the tools names the tools that the server lists", async (t) => {
  const { tools } = await listTools(t);
  assert.deepEqual(firstColumn("Tools").filter((name) => name.includes("_")).sort(), tools.sort());
});

test("the names of --break are those that the demo lists", async () => {
  const named = [...README.matchAll(/--break ([a-z-]+)/g)].map(([, name]) => name);
  const { stdout } = await run("test/run/demo.ts", "--break");
  const listed = [...stdout.matchAll(/^ +(\S+)/gm)].map(([, name]) => name);
  assert.deepEqual([...new Set(named)].sort(), listed.sort());
});

test("the demo's output stands in the README as the demo prints it", async () => {
  const [quoted = ""] = blocks("text", "Alice links the server");
  const { stdout } = await run("test/run/demo.ts");
  const general = (text: string) =>
    text.replace(/localhost:\d+/g, "localhost").replace(/[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}/g, "ID");
  assert.ok(quoted.length > 300);
  for (const part of general(quoted).split(/^ *…\n/m)) assert.ok(general(stdout).includes(part), part);
});

test("Step 6 calls a tool as it is pasted", async (t) => {
  const port = await freePort();
  const url = `http://localhost:${port}/mcp`;
  const tenant = await startTenant(configuredTenant("permissive", url));
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url });
  t.after(server.close);

  const directory = await temporaryDirectory(t);
  const [machine] = tenant.settings.applications;
  const environment = {
    AUTH0_DOMAIN: tenant.origin,
    MCP_SERVER_URL: url,
    AUTH0_CLIENT_ID: machine?.clientId,
    AUTH0_CLIENT_SECRET: machine?.clientSecret,
  };
  await writeFile(
    join(directory, ".env"),
    Object.entries(environment).map((pair) => `${pair.join("=")}\n`).join(""),
  );
  const [script = ""] = blocks("sh", "client_credentials");
  // A tenant has https and a domain of its own; the stand-in has neither.
  const pasted = script.replace("https://$AUTH0_DOMAIN", "$AUTH0_DOMAIN");
  assert.notEqual(pasted, script);
  const { stdout } = await promisify(execFile)("sh", ["-ec", pasted], { cwd: directory });
  assert.equal(JSON.parse(stdout).result.structuredContent.task.title, "Written with curl");
});

test("the tool of Make it yours compiles, is listed and runs as it stands", async (t) => {
  const [added = ""] = blocks("ts", "defineTool");
  const directory = await temporaryDirectory(t);
  for (const file of ["server.ts", "auth.ts", "tsconfig.json", "package.json"]) {
    await cp(join(ROOT, file), join(directory, file));
  }
  await symlink(join(ROOT, "node_modules"), join(directory, "node_modules"));
  const end = "\n];\n\nfunction toUtc"; // of the tools array
  assert.ok(read("tools.ts").includes(end));
  await writeFile(join(directory, "tools.ts"), read("tools.ts").replace(end, () => `\n${added}${end}`));

  const compiler = join(
    dirname(dirname(new URL(import.meta.resolve("typescript/package.json")).pathname)),
    "typescript/bin/tsc",
  );
  await promisify(execFile)("node", [compiler, "-p", directory]);

  const { createServer }: typeof import("../server.ts") = await import(
    pathToFileURL(join(directory, "server.ts")).href
  );
  const { tools, call } = await listTools(t, createServer);
  assert.ok(tools.includes("list_due_tasks"));
  await call("create_task", { title: "Overdue", due_at: "2020-01-01T00:00:00Z" });
  await call("create_task", { title: "Some day" });
  const { structuredContent } = await call("list_due_tasks", {});
  assert.deepEqual(structuredContent.tasks.map(({ title }: { title: string }) => title), ["Overdue"]);
});

test("the line for the e-mail works inside the Action", async () => {
  const [line = ""] = blocks("js", "setCustomClaim");
  const claims: Record<string, unknown> = {};
  const exports: { onExecutePostLogin?: (event: unknown, api: unknown) => Promise<void> } = {};
  runInNewContext(read("auth0-action.js").replace(/\};\s*$/, () => `${line}};`), { exports });
  const accessToken = {
    addScope: () => {},
    setCustomClaim: (name: string, value: unknown) => claims[name] = value,
  };
  await exports.onExecutePostLogin?.({ user: ALICE, transaction: {} }, { accessToken });
  assert.deepEqual(claims, { "https://your-domain.com/email": ALICE.email });
});

/** Runs a file of the repository on the runtime and with the loader that run this one. */
function run(file: string, ...args: string[]): Promise<{ stdout: string }> {
  return promisify(execFile)(process.execPath, [...RUNTIME_FLAGS, join(ROOT, file), ...args]);
}

/** The tools of a server that is started for it, and a way to call them. */
async function listTools(t: TestContext, createServer?: typeof import("../server.ts").createServer) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin }, undefined, createServer);
  t.after(server.close);
  const token = await tenant.sign({ aud: server.url });
  const send = async (method: string, params: unknown) =>
    (await (await post(server.url, token, method, params)).json()).result;
  const { tools } = await send("tools/list", {});
  return {
    tools: tools.map(({ name }: { name: string }): string => name),
    call: (name: string, input: Record<string, unknown>) => send("tools/call", { name, arguments: input }),
  };
}
