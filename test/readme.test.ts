/** What the two READMEs say is so: their links, names and commands exist, and their code runs as it stands there. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { cp, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { TestContext } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { runInNewContext } from "node:vm";
import { challenge } from "../auth.ts";
import { environment } from "../server.ts";
import { newTask, openTaskStore, requestedScopes, RESOURCE_NAME } from "../tools.ts";
import type { TaskStore } from "../tools.ts";
import { demo } from "./run/demo.ts";
import { freePort, noSqlite, post, startServer } from "./support/server.ts";
import { isStrict, settingsFor } from "./support/tenant-settings.ts";
import type { ClientKind, SettingName } from "./support/tenant-settings.ts";
import { ALICE, configuredTenant, startTenant } from "./support/tenant.ts";

const ROOT = join(import.meta.dirname, "..");
const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
const README = read("README.md");

/** The code blocks of a language, or those among them that hold a text, without the indent of a list. */
function blocks(language: string, holding = ""): string[] {
  const all = [...README.matchAll(/^( *)```(\w+)\n(.*?)^ *```$/gms)];
  return all.flatMap(([, indent = "", name, code = ""]) =>
    name === language && code.includes(holding) ? [code.replaceAll(new RegExp(`^${indent}`, "gm"), "")] : []
  );
}

/** The only such block. */
function block(language: string, holding: string): string {
  const [found, ...others] = blocks(language, holding);
  assert.ok(found !== undefined && others.length === 0, `Not one block of ${language} with ${holding}`);
  return found;
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

for (const path of ["README.md", "test/README.md"]) {
  const text = read(path);

  test(`every link of ${path} leads to a heading or a file that exists`, () => {
    const headings = [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading = ""]) =>
      `#${heading.toLowerCase().replace(/[^\w -]/g, "").replaceAll(" ", "-")}`
    );
    const links = [...text.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
    assert.ok(links.length > 0);
    for (const link of links.filter((link) => !link.startsWith("https://"))) {
      const exists = link.startsWith("#") ? headings.includes(link) : existsSync(join(ROOT, dirname(path), link));
      assert.ok(exists, link);
    }
  });

  test(`every file that ${path} names exists, but for those of the reader's own`, () => {
    const own = ["tasks.db", "client.json", "jwks.json"];
    const places = [".", "test", "test/run", "test/support"];
    const named = [...text.matchAll(/(?<![\w/.*-])(?:[\w-]+\/)*\w[\w.-]*\.(?:ts|js|json|db)\b/g)].map(([name]) => name);
    const isKnown = (name: string) => places.some((place) => existsSync(join(ROOT, place, name)));
    assert.deepEqual([...new Set(named)].filter((name) => !own.includes(name) && !isKnown(name)), []);
  });
}

test("every npm script that is named exists, and every script is named", () => {
  const named = [...README.matchAll(/\bnpm (?:run )?(start|test|(?<=run )[a-z]+)/g)].map(([, name]) => name);
  const scripts = Object.keys(JSON.parse(read("package.json")).scripts);
  assert.deepEqual([...new Set(named)].sort(), scripts.sort());
});

test("no shell command ends in a comment, which zsh would pass on as arguments", () => {
  for (const code of [...blocks("sh"), ...blocks("bash")]) assert.doesNotMatch(code, /(^|\s)#/);
});

test("the table of the environment names the settings that the server reads, and the example file too", () => {
  const settings = Object.keys(environment.shape);
  const capitals = firstColumn("Environment").filter((name) => /^[A-Z0-9_]+$/.test(name));
  assert.deepEqual(capitals.sort(), settings.toSorted());

  const example = [...read(".env.example").matchAll(/^#? ?([A-Z0-9_]+)=/gm)].map(([, name = ""]) => name);
  const ofCommands = ["AUTH0_CLIENT_ID", "AUTH0_CLIENT_SECRET", "AUTH0_MANAGEMENT_TOKEN"];
  assert.deepEqual(example.sort(), [...settings, ...ofCommands].sort());
  for (const name of ofCommands) assert.ok(section("Environment").includes(`\`${name}\``), name);
});

test("the tools and scopes that are named are those of the server", async (t) => {
  const { tools } = await startWith(t);
  const named = [...section("Permissions per tool").matchAll(/`([a-z]+[_:][a-z]+)`/g)].map(([, name]) => name);
  const scopes = requestedScopes(true).filter((scope) => scope.includes(":"));
  assert.deepEqual(named.sort(), [...tools, ...scopes].sort());
});

test("the names of --break are those that the demo lists", async () => {
  const named = [...README.matchAll(/--break ([a-z-]+)/g)].map(([, name]) => name);
  const stdout = await runDemo("--break");
  const listed = [...stdout.matchAll(/^ +(\S+)/gm)].map(([, name]) => name);
  assert.deepEqual([...new Set(named)].sort(), listed.sort());
});

test("the demo's output stands in the README as the demo prints it", async () => {
  const quoted = block("text", "Alice links the server");
  const stdout = await runDemo();
  const general = (text: string) =>
    text.replace(/localhost:\d+/g, "localhost").replace(/[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}/g, "ID");
  for (const part of general(quoted).split(/^ *…\n/m)) assert.ok(general(stdout).includes(part), part);
});

test("the challenge of Step 0 is the server's", () => {
  const resource = {
    issuer: "https://tenant.example.auth0.com/",
    url: "https://your-domain.com/mcp",
    name: RESOURCE_NAME,
    scopes: requestedScopes(false),
  };
  assert.equal(block("text", "www-authenticate").trim(), `www-authenticate: ${challenge(resource)}`);
});

test("the Action of Step 4 is that of auth0-action.js", () => {
  const [, code = ""] = read("auth0-action.js").split("*/\n");
  assert.equal(block("js", "onExecutePostLogin"), code);
});

test("the line for the e-mail works inside the Action", async () => {
  const line = block("js", "setCustomClaim");
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

test("the table of ways says what the tests walk: what each kind of client needs, and nothing else", () => {
  const columns: ClientKind[][] = [
    [{ tenant: "strict", way: "register" }],
    [{ tenant: "strict", way: "cimd" }, { tenant: "permissive", way: "cimd" }],
    [{ tenant: "permissive", way: "register" }],
    [{ tenant: "strict", way: "fixed" }, { tenant: "permissive", way: "fixed" }],
  ];
  const settingsOfRow: Record<string, SettingName[]> = {
    "API, Allow Offline Access": ["api", "offline-access"],
    "Default Permissions": ["default-permissions"],
    "Default Audience": ["default-audience"],
    "Client registration": ["registration", "cimd"],
    "Promote the connection": ["connection"],
    "Action": ["action"],
    "Application": ["application", "callback", "application-connection", "refresh-grant", "rotation"],
  };
  const rows = [...section("Which way is yours").matchAll(/^\| (\[.*)\|$/gm)].map(([, row = ""]) =>
    row.split("|").map((cell) => cell.trim())
  );
  const cell = (name: string, column: number) =>
    rows.find(([step]) => step?.includes(name))?.[column + 1] ?? assert.fail(`No row ${name}`);

  assert.equal(rows.length, Object.keys(settingsOfRow).length + 1); // and the tick in ChatGPT's form
  for (const [column, clients] of columns.entries()) {
    for (const client of clients) {
      const needed = Object.entries(settingsOfRow).flatMap(([row, names]) =>
        cell(row, column) === "–" ? [] : names.filter((name) =>
          row !== "Client registration" ||
          cell(row, column).startsWith(name === "cimd" ? "CIMD" : "Dynamic")
        )
      );
      assert.deepEqual(needed.sort(), settingsFor(client).sort(), JSON.stringify(client));
      assert.equal(cell("OIDC enabled", column).startsWith("untick"), isStrict(client));
    }
  }
});

test("Step 6, with its placeholders filled in, gets a token and calls a tool", async (t) => {
  const url = `http://localhost:${await freePort()}/mcp`;
  const tenant = await startTenant(configuredTenant("strict", url));
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url });
  t.after(server.close);

  const paste = async (command: string, token = "") => {
    const filledIn = command
      .replace("https://your-tenant.us.auth0.com", tenant.origin)
      .replace("https://your-domain.com/mcp", url)
      .replace("=CLIENT_ID", "=machine")
      .replace("=CLIENT_SECRET", "=machine-secret")
      .replace("ACCESS_TOKEN", token);
    return JSON.parse((await promisify(execFile)("sh", ["-c", filledIn])).stdout);
  };
  const [getToken = "", callTool = ""] = block("sh", "client_credentials").split(/^(?=curl)/m);
  const { access_token: token } = await paste(getToken);
  assert.deepEqual((await paste(callTool, token)).result.structuredContent, { tasks: [] });
});

describe("Make it yours", () => {
  /** What each section makes of tools.ts. */
  const changes = {
    tool(source: string) {
      const end = source.indexOf("\n];\n", source.indexOf("\nconst tools = ["));
      return `${source.slice(0, end)}\n${block("ts", "defineTool")}${source.slice(end)}`;
    },
    column: (source: string) => apply(block("diff", "ALTER TABLE"), source),
    database: (source: string) =>
      `${apply(block("diff", "mongoStore"), source)}
       function mongoStore(url: string) {
         const nothing = () => Promise.resolve(undefined);
         const list = () => Promise.resolve([]);
         const remove = () => Promise.resolve(false);
         return { url, list, create: nothing, update: nothing, delete: remove, check: nothing, close: nothing };
       }`,
  };
  let directory: string;

  // All of them have to compile, in one run of the compiler: on one thread it takes half the CPU time.
  before(async () => {
    directory = await mkdtemp(join(tmpdir(), "readme-"));
    await symlink(join(ROOT, "node_modules"), join(directory, "node_modules"));
    await cp(join(ROOT, "package.json"), join(directory, "package.json"));
    const configuration = { extends: join(ROOT, "tsconfig.json"), include: ["*/*.ts"] };
    await writeFile(join(directory, "tsconfig.json"), JSON.stringify(configuration));
    for (const [name, change] of Object.entries(changes)) {
      for (const file of ["server.ts", "auth.ts"]) await cp(join(ROOT, file), join(directory, name, file));
      await writeFile(join(directory, name, "tools.ts"), change(read("tools.ts")));
    }
    const compiler = join(fileURLToPath(import.meta.resolve("typescript/package.json")), "../bin/tsc");
    await promisify(execFile)("node", [compiler, "--singleThreaded", "-p", directory]).catch(({ stdout }) =>
      assert.fail(stdout)
    );
  });

  after(() => rm(directory, { recursive: true }));

  async function changed(name: keyof typeof changes) {
    const load = (file: string) => import(pathToFileURL(join(directory, name, file)).href);
    const { createServer, readSettings }: typeof import("../server.ts") = await load("server.ts");
    const { openTaskStore }: typeof import("../tools.ts") = await load("tools.ts");
    return { createServer, readSettings, openTaskStore };
  }

  test("Add a tool: it compiles, asks for its new scope, and runs with it", async (t) => {
    const { createServer } = await changed("tool");
    const env = { ENFORCE_SCOPES: "true" };
    const { tools, scopes, call } = await startWith(t, { env, create: createServer });
    assert.ok(tools.includes("delete_done_tasks"));
    assert.ok(scopes.includes("tasks:clean"));

    const refused = await call("delete_done_tasks", {}, "tasks:read tasks:write");
    assert.match(refused._meta["mcp/www_authenticate"][0], /error="insufficient_scope".*tasks:clean/);

    const granted = "tasks:read tasks:write tasks:clean";
    const { task: { id } } = (await call("create_task", { title: "Done" }, granted)).structuredContent;
    await call("update_task", { id, status: "done" }, granted);
    await call("create_task", { title: "Open" }, granted);
    assert.deepEqual((await call("delete_done_tasks", {}, granted)).structuredContent, { deleted: 1 });
    const { tasks } = (await call("list_tasks", {}, granted)).structuredContent;
    assert.deepEqual(tasks.map(({ title }: { title: string }) => title), ["Open"]);
  });

  test("Add a column: a file from before gets it, and the tools take it", { skip: noSqlite }, async (t) => {
    const directory = await temporaryDirectory(t);
    const url = `file:${join(directory, "tasks.db")}`;
    const before = await openTaskStore(url, assert.fail);
    await before.create(ALICE.sub, newTask({ title: "Old", notes: null, due_at: null }));
    await before.close();

    const { createServer, openTaskStore: openChanged } = await changed("column");
    const { call } = await startWith(t, {
      create: createServer,
      store: await openChanged(url, assert.fail),
    });
    await call("create_task", { title: "New", project: "House" });
    const listed = async () => {
      const { tasks } = (await call("list_tasks", {})).structuredContent;
      return tasks.map(({ title, project }: Record<string, unknown>) => [title, project]);
    };
    assert.deepEqual(await listed(), [["New", "House"], ["Old", null]]);

    const { tasks: [newest] } = (await call("list_tasks", { limit: 1 })).structuredContent;
    await call("update_task", { id: newest.id, project: null });
    assert.deepEqual(await listed(), [["New", null], ["Old", null]]);
  });

  test("Another database: its scheme is a setting, and its store opens", async (t) => {
    const { createServer, readSettings, openTaskStore: openChanged } = await changed("database");
    const { DATABASE_URL } = readSettings({
      AUTH0_DOMAIN: "tenant.example.auth0.com",
      MCP_SERVER_URL: "https://mcp.example.com/mcp",
      DATABASE_URL: "mongodb://localhost/tasks",
    });
    const opened = await openChanged(DATABASE_URL, assert.fail);
    assert.equal("url" in opened && opened.url, "mongodb://localhost/tasks");
    const { call } = await startWith(t, { create: createServer, store: opened });
    assert.deepEqual((await call("list_tasks", {})).structuredContent, { tasks: [] });
  });
});

test("what goes when the tasks go is what names a task", () => {
  const [, list = ""] = /<!-- tasks -->(.*?)<!-- \/tasks -->/s.exec(read("test/README.md")) ?? [];
  const listed = [...list.matchAll(/`([^`]+\.ts)`/g)].map(([, name = ""]) => name);
  const files = readdirSync(join(ROOT, "test"), { recursive: true, encoding: "utf8" })
    .map((name) => name.replaceAll("\\", "/"))
    .filter((name) => name.endsWith(".ts"));
  const naming = files.filter((name) => /\b(list|create|update|delete)_tasks?\b|\bTask\b/.test(read(`test/${name}`)));
  assert.deepEqual(listed.sort(), naming.sort());
});

/** Applies the changes of a `diff` block, which are parted by empty lines, wherever their lines stand. */
function apply(diff: string, source: string): string {
  const hunks = diff.trimEnd().split("\n\n").map((hunk) => {
    const lines = hunk.split("\n");
    const without = (sign: string) =>
      lines.filter((line) => !line.startsWith(sign)).map((line) => line.slice(1)).join("\n");
    return { before: without("+"), after: without("-") };
  });
  return hunks.reduce((text, { before, after }) => {
    assert.ok(text.includes(before), `tools.ts does not hold\n${before}`);
    return text.replaceAll(before, () => after);
  }, source);
}

async function runDemo(...args: string[]): Promise<string> {
  const printed: string[] = [];
  await demo(args, (text) => printed.push(`${text}\n`));
  return printed.join("");
}

interface Variation {
  env?: Record<string, string>;
  store?: TaskStore;
  create?: typeof import("../server.ts").createServer;
}

/** Starts a server: what it lists, what it asks clients to ask for, and a way to call its tools. */
async function startWith(t: TestContext, { env, store, create }: Variation = {}) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, ...env }, store, create);
  t.after(server.close);
  const send = async (method: string, params: unknown, scope = "openid") => {
    const token = await tenant.sign({ aud: server.url, scope });
    return (await (await post(server.url, token, method, params)).json()).result;
  };
  const { tools } = await send("tools/list", {});
  const metadata = await fetch(new URL("/.well-known/oauth-protected-resource", server.url));
  return {
    tools: tools.map(({ name }: { name: string }): string => name),
    scopes: (await metadata.json()).scopes_supported,
    call: (name: string, input: Record<string, unknown>, scope?: string) =>
      send("tools/call", { name, arguments: input }, scope),
  };
}
