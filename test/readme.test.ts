/** The links, names and commands of both READMEs exist, and their code runs as it is printed. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { cp, rm, writeFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { after, before, describe, test, type TestContext } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { challenge } from "../auth.ts";
import { settingsSchema } from "../server.ts";
import { newTask, openTaskStore, requestedScopes, RESOURCE_NAME, type TaskStore } from "../tools.ts";
import { Connector, publishClientMetadata } from "./support/chatgpt.ts";
import { copyTemplate, freePort, noSqlite, post, readTemplate, ROOT, startServer } from "./support/server.ts";
import { ACTION_CODE, ALICE, type ClientKind, configuredTenant, FIXED_CLIENT, isStrict } from "./support/tenant.ts";
import { loadAction, type SettingName, settingsFor, signIn, startTenant } from "./support/tenant.ts";

const README = readTemplate("README.md");
const TEST_README = readTemplate("test/README.md");

/** The code blocks of a language that hold a text, without the indent of a list. */
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

/** The text under a heading of the second or third level. */
function section(heading: string, document = README): string {
  const [, signs = "", text = ""] = new RegExp(`^(##+) ${heading}\n(.*)`, "ms").exec(document) ?? [];
  return text.split(new RegExp(`^#{2,${signs.length}} `, "m"))[0] ?? "";
}

/** The rows of a section's tables, as their cells. */
function rowsOf(heading: string, document = README): string[][] {
  const rows = section(heading, document).match(/^\|.*\|$/gm) ?? [];
  const isRow = (row: string, index: number) => !row.includes("---") && !rows[index + 1]?.includes("---");
  return rows.filter(isRow).map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

for (const path of ["README.md", "test/README.md"]) {
  const text = readTemplate(path);

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

test("the README names every npm script, and no other", () => {
  const named = [...README.matchAll(/\bnpm (?:run )?(start|test|(?<=run )[a-z]+)/g)].map(([, name]) => name);
  const scripts = Object.keys(JSON.parse(readTemplate("package.json")).scripts);
  assert.deepEqual([...new Set(named)].sort(), scripts.sort());
});

test("no shell command ends in a comment, which zsh would pass on as arguments", () => {
  for (const code of [...blocks("sh"), ...blocks("bash")]) assert.doesNotMatch(code, /(^|\s)#/);
});

test("the table of the environment names the settings that the server reads, and the example file too", () => {
  const settings = Object.keys(settingsSchema.shape);
  const named = rowsOf("Reference").flatMap(([name = ""]) => name.match(/\w+/g) ?? []);
  assert.deepEqual(named.sort(), settings.toSorted());

  const example = [...readTemplate(".env.example").matchAll(/^#? ?([A-Z0-9_]+)=/gm)].map(([, name = ""]) => name);
  const ofCommands = ["AUTH0_CLIENT_ID", "AUTH0_CLIENT_SECRET", "AUTH0_MANAGEMENT_TOKEN"];
  assert.deepEqual(example.sort(), [...settings, ...ofCommands].sort());
  for (const name of ofCommands) assert.ok(section("Reference").includes(`\`${name}\``), name);
});

test("Permissions per tool names the server's tools and scopes, and no others", async (t) => {
  const { tools } = await startWith(t);
  const named = [...section("Permissions per tool").matchAll(/`([a-z]+[_:][a-z]+)`/g)].map(([, name]) => name);
  const scopes = requestedScopes(true).filter((scope) => scope.includes(":"));
  assert.deepEqual(named.sort(), [...tools, ...scopes].sort());
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
  const [, code = ""] = ACTION_CODE.split("*/\n");
  assert.equal(block("js", "onExecutePostLogin"), code);
});

test("the line for the e-mail works inside the Action", async () => {
  const [, line = ""] = /`(api.accessToken.setCustomClaim[^`]*)`/.exec(README) ?? [];
  const claims: Record<string, unknown> = {};
  const action = loadAction(ACTION_CODE.replace(/\};\s*$/, () => `${line}};`));
  const setCustomClaim = (name: string, value: unknown) => claims[name] = value;
  await action({ user: ALICE, transaction: {} }, { accessToken: { addScope() {}, setCustomClaim } });
  assert.deepEqual(claims, { "https://your-domain.com/email": ALICE.email });
});

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const clientDocuments = await publishClientMetadata();
after(() => Promise.all([clientDocuments.close(), server.close(), tenant.close()]));

describe("Which way is yours", () => {
  const COLUMNS: [name: string, clients: ClientKind[]][] = [
    ["strict", [{ tenant: "strict", way: "register" }]],
    ["CIMD", [{ tenant: "strict", way: "cimd" }, { tenant: "permissive", way: "cimd" }]],
    ["permissive", [{ tenant: "permissive", way: "register" }]],
    ["fixed", [{ tenant: "strict", way: "fixed" }, { tenant: "permissive", way: "fixed" }]],
  ];
  type LeftOut = SettingName | "import" | "oidc" | "client";
  /** For each row, the settings of the stand-ins. */
  const SETTINGS: Record<string, LeftOut[]> = {
    "API with your URL": ["api"],
    "Allow Offline Access": ["offline-access"],
    "Default Permissions": ["default-permissions"],
    "Audience": ["default-audience"],
    "Dynamic Client Registration": ["registration"],
    "Include Issuer": ["include-issuer"],
    "CIMD and ChatGPT's document": ["cimd", "import"],
    "Connection at domain level": ["connection"],
    "Action in the flow": ["action"],
    "Application of your own": ["application", "callback", "application-connection", "refresh-grant", "rotation"],
    "OIDC enabled": ["oidc"],
    "Client ID and Secret": ["client"],
  };
  const table = rowsOf("Which way is yours").map(([setting = "", , ...cells]) => {
    const [, step = "", name = ""] = /^\[(\w+)\]\(.*?\) (.*)$/.exec(setting) ?? [];
    return { step, settings: SETTINGS[name] ?? assert.fail(`No row ${name}`), cells };
  });
  const troubles = rowsOf("Troubleshooting").map(([words = "", , fix = ""]) => ({
    words: words.split(/[`_…(]|: |, |; |\. /).filter((part) => part.length > 9),
    fix,
  }));

  /** Configures the tenant as the table says, links the server as ChatGPT does, calls a tool, and refreshes twice. */
  async function connect(t: TestContext, client: ClientKind, leftOut?: LeftOut) {
    const { tenant: kind, way } = client;
    const isSetting = leftOut !== "import" && leftOut !== "oidc" && leftOut !== "client";
    Object.assign(tenant.settings, configuredTenant(kind, server.url, way, isSetting ? leftOut : undefined));
    if (way === "cimd" && leftOut !== "import") await tenant.importFromUrl(clientDocuments.url());
    const connector = new Connector({
      mcpServerUrl: server.url,
      browser: (url) => signIn(url, ALICE),
      oidcEnabled: !isStrict(client) || leftOut === "oidc",
      ...(way === "cimd" && { clientDocuments }),
      ...(way === "fixed" && leftOut !== "client" && { fixedClient: FIXED_CLIENT }),
    });
    t.after(() => connector.close());
    await connector.link();
    await Promise.all([connector.refresh(), way === "fixed" && connector.refresh()]);
    return (await connector.callTool("list_tasks")).structuredContent;
  }

  for (const [column, [name, clients]] of COLUMNS.entries()) {
    const rows = table.filter(({ cells }) => !/^(–|leave)/.test(cells[column] ?? ""));

    for (const client of clients) {
      test(`the guide's column ${name} names what a ${client.tenant} tenant needs, and links the server`, async (t) => {
        const named = rows.flatMap(({ settings }) => settings);
        const ofChatGpt = { register: [], cimd: ["import"], fixed: ["client"] }[client.way];
        const needed = [...settingsFor(client), ...ofChatGpt, ...(isStrict(client) ? ["oidc"] : [])];
        assert.deepEqual(named.sort(), needed.sort());
        assert.deepEqual(await connect(t, client), { tasks: [] });
      });
    }

    for (const { step, settings } of rows) {
      for (const leftOut of settings) {
        test(`what the screen says for ${name} without ${leftOut} leads to Step ${step}`, async (t) => {
          const [client = assert.fail()] = clients;
          const message = await connect(t, client, leftOut).then(() => "linked", String);
          const found = troubles.filter(({ words }) => words.some((part) => message.includes(part)));
          assert.ok(found.some(({ fix }) => new RegExp(`Step ${step}\\b`).test(fix)), message);
        });
      }
    }
  }
});

test("the troubleshooting quotes every refusal of the tenant, the server, setup and the doctor", () => {
  const sources: [path: string, refusal: RegExp][] = [
    ["test/support/tenant.ts", /OAuthError\(\s*"[a-z_]+",\s*["`]([^"`$]{11,})/g],
    ["test/support/tenant.ts", /const (?:description|USERINFO_REFUSED) =\s*"([^"]+)/g],
    ["auth.ts", /["`]((?:Token|Sign in first|Auth0's signing keys)[^"`$:]*)/g],
    ["server.ts", /HttpError\((?:403|404), ["`]([^"`$:.]{9,})/g],
    ["test/run/setup", /["`](AUTH0_MANAGEMENT_TOKEN (?:is|lacks) [^"`$:,]*)/g],
    ["test/run/doctor", /^ {2}\[\/([^/(]+)\S*, "?\d/gm], // messages that lead to a step
  ];
  const troubleshooting = section("Troubleshooting").replace(/`|(?<!\w)_|_(?!\w)/g, "");
  for (const [path, refusal] of sources) {
    const files = path.endsWith(".ts") ? [path] : readdirSync(join(ROOT, path)).map((name) => `${path}/${name}`);
    const words = [...files.map(readTemplate).join("\n").matchAll(refusal)].map(([, text = ""]) => text.trim());
    assert.ok(words.length > 0, `${path}, ${refusal}`);
    for (const text of words) assert.ok(troubleshooting.includes(text.replace(/[:.]$/, "")), `${path}: ${text}`);
  }
});

test("the scripts that the README says go with test/ are those that run its files", () => {
  const scripts: Record<string, string> = JSON.parse(readTemplate("package.json")).scripts;
  const [, named = ""] = /seven scripts of `package.json` go \(([^)]*)\)/.exec(README.replaceAll("\n", " ")) ?? [];
  const lost = Object.keys(scripts).filter((name) => scripts[name]?.includes("test/"));
  assert.deepEqual([...named.matchAll(/\w+/g)].map(([name]) => name).sort(), lost.sort());
});

test("test/README.md names what goes with each part of test/, and what no longer compiles", async (t) => {
  const { scripts, devDependencies } = JSON.parse(readTemplate("package.json"));
  const rows = rowsOf("What you can delete", TEST_README).map((cells) =>
    cells.map((cell) => [...cell.matchAll(/`([^`]+)`/g)].map(([, name = ""]) => name))
  );
  const directory = await copyTemplate([], { without: ["pg", "@types/pg"] }); // imports look in parent folders, too
  t.after(() => rm(directory, { recursive: true }));
  const pathOf = (name: string) => name === "test/" || name === "tools.ts" ? name : `test/${name}`;
  const template = ["package.json", "server.ts", "auth.ts", "tools.ts", "test"];
  const expected: string[] = [];
  for (const [parts = [], others = [], broken = []] of rows) {
    const names = [...parts, ...others];
    const paths = names.filter((name) => /(\/|\.ts)$/.test(name)).map(pathOf);
    const lost = Object.keys(scripts).filter((name) => paths.some((path) => scripts[name].includes(` ${path}`)));
    assert.deepEqual(names.filter((name) => name in scripts).sort(), lost.sort());

    const without = names.filter((name) => name in devDependencies);
    const copy = await copyTemplate(template, { parent: directory, without });
    for (const path of paths) await rm(join(copy, path), { recursive: true });
    expected.push(...broken.map((name) => `${basename(copy)}/${pathOf(name)}`));
  }
  const messages = await compile(directory);
  const found = new Set([...messages.matchAll(/^(\S+?)\(\d+,\d+\): error/gm)].map(([, name = ""]) => name));
  assert.deepEqual([...found].sort(), expected.sort(), messages);
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
  /** The file that each section changes, and the change. */
  const changes = {
    tool: ["tools.ts", (source: string) => {
      const end = source.indexOf("\n];\n", source.indexOf("\nconst tools = ["));
      return `${source.slice(0, end)}\n${block("ts", "defineTool")}${source.slice(end)}`;
    }],
    column: ["tools.ts", (source: string) => apply(block("diff", "ALTER TABLE"), source)],
    resource: ["tools.ts", (source: string) => apply(block("diff", "registerResource"), source)],
    limit: ["server.ts", (source: string) => apply(block("diff", "429"), source)],
  } as const;
  let directory: string;

  // Compiles all of them in one run.
  before(async () => {
    directory = await copyTemplate(["package.json"]);
    for (const [name, [file, change]] of Object.entries(changes)) {
      for (const each of ["server.ts", "auth.ts", "tools.ts"]) await cp(join(ROOT, each), join(directory, name, each));
      await writeFile(join(directory, name, file), change(readTemplate(file)));
    }
    assert.equal(await compile(directory), "");
  });

  after(() => rm(directory, { recursive: true }));

  async function changed(name: keyof typeof changes) {
    const load = (file: string) => import(pathToFileURL(join(directory, name, file)).href);
    const { createServer }: typeof import("../server.ts") = await load("server.ts");
    const { openTaskStore }: typeof import("../tools.ts") = await load("tools.ts");
    return { createServer, openTaskStore };
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
    const url = `file:${join(directory, "tasks.db")}`;
    const before = await openTaskStore(url, assert.fail);
    await before.create(ALICE.sub, newTask({ title: "Old", notes: null, due_at: null }));
    await before.close();

    const { createServer, openTaskStore: openChanged } = await changed("column");
    const { call } = await startWith(t, { create: createServer, store: await openChanged(url, assert.fail) });
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

  test("Add a resource: it is listed beside the tools, and holds the caller's own tasks", async (t) => {
    const { createServer } = await changed("resource");
    const { tools, call, send } = await startWith(t, { create: createServer });
    assert.ok(tools.includes("list_tasks"));
    const { resources: [resource] } = await send("resources/list", {});
    await call("create_task", { title: "Buy oat milk" });
    const { contents: [{ text }] } = await send("resources/read", { uri: resource.uri });
    assert.deepEqual(JSON.parse(text).map(({ title }: { title: string }) => title), ["Buy oat milk"]);
  });

  test("Limit calls for each user: one too many is answered 429 and Retry-After, another user's is not", async (t) => {
    const { createServer } = await changed("limit");
    const { statusOf } = await startWith(t, { create: createServer });
    for (let calls = 0; calls < 120; calls++) assert.deepEqual(await statusOf("auth0|eager"), [200, null]);
    assert.deepEqual(await statusOf("auth0|eager"), [429, "60"]);
    assert.deepEqual(await statusOf("auth0|calm"), [200, null]);
  });
});

test("test/README.md lists every file that names a task", () => {
  const list = section("What goes when the tasks go", TEST_README);
  const listed = [...list.matchAll(/`([^`]+\.ts)`/g)].map(([, name = ""]) => name);
  const files = readdirSync(join(ROOT, "test"), { recursive: true, encoding: "utf8" })
    .map((name) => name.replaceAll("\\", "/"))
    .filter((name) => name.endsWith(".ts"));
  const naming = files.filter((name) =>
    /\b(list|create|update|delete)_tasks?\b|\bTask\b/.test(readTemplate(`test/${name}`))
  );
  assert.deepEqual(listed.sort(), naming.sort());
});

/** Checks the types of all files in a directory. Gives the compiler's messages. */
async function compile(directory: string): Promise<string> {
  const configuration = { extends: join(ROOT, "tsconfig.json"), include: ["**/*.ts"] };
  await writeFile(join(directory, "tsconfig.json"), JSON.stringify(configuration));
  const compiler = join(fileURLToPath(import.meta.resolve("typescript/package.json")), "../bin/tsc");
  // One thread takes half the CPU time.
  const run = promisify(execFile)("node", [compiler, "--singleThreaded", "-p", "."], { cwd: directory });
  return (await run.catch((error: { stdout: string }) => error)).stdout;
}

/** Applies the changes of a `diff` block, which empty lines separate. They have no line numbers. */
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

interface Variation {
  env?: Record<string, string>;
  store?: TaskStore;
  create?: typeof import("../server.ts").createServer;
}

/** Starts a server. Gives its tools, the scopes of its metadata, and functions that call it. */
async function startWith(t: TestContext, { env, store, create }: Variation = {}) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, ...env }, store, create);
  t.after(server.close);
  const request = async (method: string, params: unknown, claims: Record<string, unknown>) =>
    await post(server.url, await tenant.sign({ aud: server.url, ...claims }), method, params);
  const send = async (method: string, params: unknown, scope = "openid") =>
    (await (await request(method, params, { scope })).json()).result;
  const { tools } = await send("tools/list", {});
  const metadata = await fetch(new URL("/.well-known/oauth-protected-resource", server.url));
  return {
    tools: tools.map(({ name }: { name: string }): string => name),
    scopes: (await metadata.json()).scopes_supported,
    send,
    call: (name: string, input: Record<string, unknown>, scope?: string) =>
      send("tools/call", { name, arguments: input }, scope),
    async statusOf(sub: string): Promise<[status: number, retryAfter: string | null]> {
      const response = await request("ping", {}, { sub });
      await response.body?.cancel();
      return [response.status, response.headers.get("retry-after")];
    },
  };
}
