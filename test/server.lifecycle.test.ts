/** Start and stop: settings, `.env`, the log, signals, mistakes that nobody caught. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import type { ServerResponse } from "node:http";
import { createServer as createNetServer } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { after, before, test } from "node:test";
import type { TestContext } from "node:test";
import { readEnvironment, readSettings, stop } from "../server.ts";
import { freePort, logOf, open, post, spawnServer, startServer, until } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

const REQUIRED = { AUTH0_DOMAIN: "tenant.example.auth0.com", MCP_SERVER_URL: "https://mcp.example.com/mcp" };

const PING = JSON.stringify({ jsonrpc: "2.0", id: 1, method: "ping" });

let tenant: Tenant;
let directory: string;

before(async () => {
  tenant = await startTenant();
  directory = await mkdtemp(join(tmpdir(), "start-"));
});

after(async () => {
  await tenant.close();
  await rm(directory, { recursive: true });
});

test("two settings are enough, and the rest has defaults", () => {
  assert.deepEqual(readSettings(REQUIRED), {
    ...REQUIRED,
    issuer: "https://tenant.example.auth0.com/",
    PORT: 3000,
    HOST: "127.0.0.1",
    ENFORCE_SCOPES: false,
    ALLOWED_ORIGINS: [],
    LOG_LEVEL: "info",
  });
});

test("every setting can be set", () => {
  const env = {
    ...REQUIRED,
    PORT: "8080",
    HOST: "0.0.0.0",
    DATABASE_URL: "postgres://user:password@db.example/tasks?sslmode=require",
    ENFORCE_SCOPES: "true",
    ALLOWED_ORIGINS: "https://example.com, chrome-extension://abcdefghijklmnop,evil://localhost,",
    OPENAI_APPS_CHALLENGE: "f00d",
    LOG_LEVEL: "debug",
  };
  assert.deepEqual(readSettings(env), {
    ...env,
    issuer: "https://tenant.example.auth0.com/",
    PORT: 8080,
    ENFORCE_SCOPES: true,
    ALLOWED_ORIGINS: ["https://example.com", "chrome-extension://abcdefghijklmnop", "evil://localhost"],
  });
});

test("a setting that is empty counts as not set", () => {
  const names = "PORT HOST DATABASE_URL ENFORCE_SCOPES ALLOWED_ORIGINS OPENAI_APPS_CHALLENGE LOG_LEVEL".split(" ");
  const empty = Object.fromEntries(names.map((name) => [name, ""]));
  assert.deepEqual(readSettings({ ...REQUIRED, ...empty }), readSettings(REQUIRED));
  assert.throws(() => readSettings({ ...REQUIRED, AUTH0_DOMAIN: "" }), /^Error: AUTH0_DOMAIN is missing: it must be /);
});

test("the README's placeholders count as missing", () => {
  const placeholders = {
    AUTH0_DOMAIN: ["your-tenant.us.auth0.com", "your-tenant.eu.auth0.com"],
    MCP_SERVER_URL: ["https://your-domain.com/mcp", "https://your-domain.com/other"],
  };
  for (const [name, values] of Object.entries(placeholders)) {
    for (const value of values) {
      assert.throws(() => readSettings({ ...REQUIRED, [name]: value }), new RegExp(`^Error: ${name} is missing`));
    }
  }
});

test("a custom domain may be an internationalized one", () => {
  const domain = "login.xn--e1afmkfd.xn--p1ai";
  assert.equal(readSettings({ ...REQUIRED, AUTH0_DOMAIN: domain }).issuer, `https://${domain}/`);
});

test("a stand-in tenant is named by its origin, on loopback only", () => {
  for (const origin of ["http://localhost:4000", "http://127.0.0.1:4000", "http://[::1]:4000"]) {
    assert.equal(readSettings({ ...REQUIRED, AUTH0_DOMAIN: origin }).issuer, `${origin}/`);
  }
});

test("a malformed setting is named, with the rule that it breaks and what it must look like", () => {
  const malformed: [name: string, value: string, rule: RegExp][] = [
    ["AUTH0_DOMAIN", "https://tenant.example.auth0.com", /scheme/],
    ["AUTH0_DOMAIN", "http://localhost.evil.example", /scheme/],
    ["AUTH0_DOMAIN", "tenant.example.auth0.com/", /slash/],
    ["AUTH0_DOMAIN", "http://localhost:4000/", /slash/],
    ["AUTH0_DOMAIN", "http://localhost:4000/path", /slash/],
    ["AUTH0_DOMAIN", "Tenant.example.auth0.com", /capital/],
    ["AUTH0_DOMAIN", "my tenant", /no domain/],
    ["AUTH0_DOMAIN", "tenant", /no domain/],
    ["AUTH0_DOMAIN", "127.0.0.1", /no domain/],
    ["AUTH0_DOMAIN", "tenant.example.auth0.com:443", /no domain/],
    ["AUTH0_DOMAIN", "tenant.example.auth0.com?x", /no domain/],
    ["AUTH0_DOMAIN", "http://localhost:4000?x", /./],
    ["AUTH0_DOMAIN", "ftp://localhost", /./],
    ["AUTH0_DOMAIN", "http://user@localhost:4000", /./],
    ["MCP_SERVER_URL", "mcp.example.com/mcp", /no URL/],
    ["MCP_SERVER_URL", "http://mcp.example.com/mcp", /not https/],
    ["MCP_SERVER_URL", "ftp://localhost/mcp", /not https/],
    ["MCP_SERVER_URL", "https://mcp.example.com", /no path/],
    ["MCP_SERVER_URL", "https://mcp.example.com/", /no path/],
    ["MCP_SERVER_URL", "https://mcp.example.com/mcp/", /slash/],
    ["MCP_SERVER_URL", "https://mcp.example.com/mcp?x=1", /query/],
    ["MCP_SERVER_URL", "https://mcp.example.com/mcp?", /query/],
    ["MCP_SERVER_URL", "https://mcp.example.com/mcp#top", /fragment/],
    ["MCP_SERVER_URL", "https://user:hunter2@mcp.example.com/mcp", /normal form/],
    ["MCP_SERVER_URL", "https://:hunter2@mcp.example.com/mcp", /normal form/],
    ["MCP_SERVER_URL", "https://Mcp.example.com/mcp", /normal form/],
    ["MCP_SERVER_URL", "https://mcp.example.com:443/mcp", /normal form/],
    ["MCP_SERVER_URL", "https://mcp.example.com/a/../mcp", /normal form/],
    ["PORT", "http", /no port number/],
    ["PORT", "0", /no port number/],
    ["PORT", "-1", /no port number/],
    ["PORT", "3000.5", /no port number/],
    ["PORT", "1e3", /no port number/],
    ["PORT", " 3000", /no port number/],
    ["PORT", "65536", /too large/],
    ["ENFORCE_SCOPES", "yes", /./],
    ["ENFORCE_SCOPES", "TRUE", /./],
    ["ENFORCE_SCOPES", "1", /./],
    ["ALLOWED_ORIGINS", "example.com", /./],
    ["ALLOWED_ORIGINS", "https://example.com/", /./],
    ["ALLOWED_ORIGINS", "https://example.com, *", /./],
    ["LOG_LEVEL", "verbose", /./],
  ];
  for (const [name, value, rule] of malformed) {
    const read = () => readSettings({ ...REQUIRED, [name]: value });
    assert.throws(read, ({ message }: Error) => {
      assert.equal(message.split("\n").length, 1, message);
      const [found = "", expected] = message.split(": it must be ");
      assert.ok(found.startsWith(`${name} `), message);
      assert.match(found, rule, message);
      assert.ok(expected, message);
      return true;
    }, `${name}=${value}`);
  }
});

test("a malformed value is not repeated, since it may hold a password", () => {
  const urls = ["mysql://user:hunter2@localhost/tasks", "hunter2.db", "file:", "memory"];
  const values = [
    ["MCP_SERVER_URL", "https://user:hunter2@mcp.example.com/mcp"],
    ...urls.map((url) => ["DATABASE_URL", url]),
  ];
  for (const [name = "", value] of values) {
    assert.throws(() => readSettings({ ...REQUIRED, [name]: value }), ({ message }: Error) => {
      assert.ok(message.startsWith(`${name} is `) && message.includes(": it must be "), message);
      assert.ok(!message.includes("hunter2") && !message.includes("mysql"));
      return true;
    });
  }
});

/** What the server would read with this `.env` and, beside the test's own environment, this one. */
async function environmentOf(t: TestContext, file: string, real: Record<string, string> = {}) {
  await writeFile(join(directory, ".env"), file);
  const [before, cwd] = [{ ...process.env }, process.cwd()];
  t.after(() => {
    process.chdir(cwd);
    for (const name of Object.keys(real)) delete process.env[name];
    Object.assign(process.env, before);
  });
  process.chdir(directory);
  Object.assign(process.env, real);
  return readEnvironment();
}

test("a .env with a byte order mark, CRLF and quotes is read", async (t) => {
  const lines = [
    "\uFEFFAUTH0_DOMAIN=tenant.example.auth0.com",
    'LOG_LEVEL="debug"',
    "",
    "# HOST=1.2.3.4",
    "PORT='81' # web",
  ];
  const { env, differences } = await environmentOf(t, lines.join("\r\n"));
  const { AUTH0_DOMAIN, LOG_LEVEL, PORT, HOST } = env;
  assert.deepEqual(
    { AUTH0_DOMAIN, LOG_LEVEL, PORT, HOST },
    { AUTH0_DOMAIN: "tenant.example.auth0.com", LOG_LEVEL: "debug", PORT: "81", HOST: process.env.HOST },
  );
  assert.deepEqual(differences, []);
});

test("without a .env there is the environment alone", async (t) => {
  await environmentOf(t, "");
  await rm(join(directory, ".env"));
  assert.deepEqual(readEnvironment().differences, []);
  assert.equal(readEnvironment().env.PATH, process.env.PATH);
});

test("the real environment wins over .env, but not where it is empty", async (t) => {
  const { env, differences } = await environmentOf(t, "ENFORCE_SCOPES=true\nPORT=81\nLOG_LEVEL=debug\nHOST=", {
    ENFORCE_SCOPES: "",
    PORT: "82",
    LOG_LEVEL: "debug",
    HOST: "0.0.0.0",
  });
  assert.deepEqual([env.ENFORCE_SCOPES, env.PORT, env.LOG_LEVEL, env.HOST], ["true", "82", "debug", "0.0.0.0"]);
  assert.equal(readSettings({ ...REQUIRED, ...env }).ENFORCE_SCOPES, true);
  assert.equal(differences.length, 1);
  assert.match(differences.join(), /^PORT differs from \.env, and the environment's value counts: '82', not '81'$/);
});

test("where .env and the environment differ a line names both values, but of secrets the name alone", async (t) => {
  const names = ["DATABASE_URL", "OPENAI_APPS_CHALLENGE", "AUTH0_MANAGEMENT_TOKEN", "SOME_CLIENT_SECRET"];
  const { differences } = await environmentOf(
    t,
    names.map((name) => `${name}=in-file`).join("\n"),
    Object.fromEntries(names.map((name) => [name, "in-environment"])),
  );
  assert.deepEqual(differences.map((line) => /^\w+/.exec(line)?.[0]).toSorted(), names.toSorted());
  for (const line of differences) assert.doesNotMatch(line, /in-file|in-environment/);
});

test("the start says which value counts where .env and the environment differ", async (t) => {
  const [inFile, real] = [await freePort(), await freePort()];
  const url = `http://localhost:${inFile}/from-file`;
  const file = { AUTH0_DOMAIN: tenant.origin, PORT: inFile, DATABASE_URL: "memory:", MCP_SERVER_URL: url };
  await writeFile(join(directory, ".env"), Object.entries(file).map((pair) => pair.join("=")).join("\n"));
  const { kill, lines, ready, exited } = spawnServer({ PORT: String(real) }, directory);
  t.after(() => kill("SIGKILL"));
  await ready;
  const reply = await fetch(`http://127.0.0.1:${real}/.well-known/oauth-protected-resource`);
  assert.equal((await reply.json()).resource, url);
  assert.match(lines[0] ?? "", new RegExp(`PORT differs from .env, .*'${real}', not '${inFile}'`));
  kill("SIGTERM");
  assert.equal(await exited, 0);
});

test("the start stops with one line a value that is missing or malformed, at every LOG_LEVEL", async () => {
  const { lines, exited } = spawnServer({
    PORT: "high",
    MCP_SERVER_URL: "https://your-domain.com/mcp",
    LOG_LEVEL: "silent",
  });
  assert.equal(await exited, 1);
  assert.equal(lines.length, 3, lines.join("\n"));
  assert.deepEqual(lines.map((line) => line.split(" ")[0]), ["AUTH0_DOMAIN", "MCP_SERVER_URL", "PORT"]);
});

test("a port in use is one clear line", async (t) => {
  const other = createNetServer().listen(0, "127.0.0.1");
  t.after(() => other.close());
  await once(other, "listening");
  const { port } = other.address() as AddressInfo;
  const { lines, exited } = spawnServer({
    ...REQUIRED,
    PORT: String(port),
    DATABASE_URL: "memory:",
    LOG_LEVEL: "silent",
  });
  assert.equal(await exited, 1);
  assert.deepEqual(lines, [`listen EADDRINUSE: address already in use 127.0.0.1:${port}`]);
});

/** What a server writes to its log at this level during a good call, one with a bad token, and one that is no POST. */
async function logOfCalls(t: TestContext, level: string): Promise<{ log: string; token: string }> {
  const lines = logOf(t);
  const { url, close } = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: level });
  t.after(close);
  const token = await tenant.sign({ aud: url, azp: "chatgpt" });
  for (const sent of [token, `${token}x`]) {
    const name = "no_such\u2028tool\n\u001b[31m";
    const reply = await post(`${url}?secret=in-query`, sent, "tools/call", { name });
    await reply.text();
  }
  await (await fetch(url, { method: "DELETE", headers: { authorization: `Bearer ${token}` } })).text();
  return { log: lines.join(""), token };
}

test("the log at info has refusals with their reason", async (t) => {
  const { log } = await logOfCalls(t, "info");
  assert.match(log, /^\S+Z POST \/mcp 401 \d+ ms Token's signature.*\n\S+Z DELETE \/mcp 405 .*\n$/);
});

test("the log at debug has every request with the claims that decide, and no token, query or control character", async (t) => {
  const { log, token } = await logOfCalls(t, "debug");
  const [first = "", second = "", third = ""] = log.split("\n");
  assert.match(
    first,
    / POST \/mcp tools\/call no_such\?tool\?\?\[31m 200 \d+ ms auth0\|alice \{"iss":"http.*"azp":"chatgpt"/,
  );
  assert.match(second, / POST \/mcp 401 /);
  assert.match(third, / DELETE \/mcp 405 \d+ ms auth0\|alice Only POST/);
  for (const part of [...token.split("."), "in-query", "\u001b"]) assert.ok(!log.includes(part), part);
});

test("the log at silent is silent", async (t) => {
  assert.equal((await logOfCalls(t, "silent")).log, "");
});

const keySet = async () => (await fetch(`${tenant.issuer}.well-known/jwks.json`)).text();

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  test(`${signal} refuses new connections, lets the request in flight finish and ends with status 0`, async (t) => {
    const port = await freePort();
    const url = `http://localhost:${port}/mcp`;
    const env = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url, PORT: String(port), DATABASE_URL: "memory:" };
    const { kill, lines, ready, exited } = spawnServer(env);
    t.after(() => kill("SIGKILL"));
    await ready;
    assert.match(lines.join(), /Listening on 127\.0\.0\.1:\d+ for http/);

    const asked = new Promise<ServerResponse>((resolve) => tenant.answerJwks = resolve);
    t.after(() => tenant.answerJwks = undefined);
    const inFlight = await open(port);
    const token = await tenant.sign({ aud: url });
    inFlight.write(`POST /mcp HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n`);
    inFlight.write(`authorization: Bearer ${token}\r\ncontent-length: ${PING.length}\r\n\r\n${PING.slice(0, 9)}`);
    const keys = await asked; // so the server is at work on it
    kill(signal);
    await until(() => lines.some((line) => line.endsWith(`Stopping on ${signal}`)), "it says that it stops");
    await assert.rejects(fetch(url));
    tenant.answerJwks = undefined;
    keys.end(await keySet());
    inFlight.write(PING.slice(9));
    assert.match(await text(inFlight), /^HTTP\/1.1 200 /);
    assert.equal(await exited, 0);
  });
}

test("a client that never ends its request holds up the stop for seconds only", async (t) => {
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  t.after(server.close);
  const socket = await open(Number(new URL(server.url).port));
  t.after(() => socket.destroy());
  socket.write("POST /mcp HTTP/1.1\r\nhost: localhost\r\n");
  assert.equal((await fetch(new URL("/health", server.url))).status, 200); // by now the server knows both
  t.mock.timers.enable({ apis: ["setTimeout", "setInterval"] });
  let hasStopped = false;
  void stop(server.http).then(() => hasStopped = true);
  t.mock.timers.tick(9_000);
  await until(() => hasStopped, "the server has stopped");
});

test("while it stops the health check says 503", async (t) => {
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  t.after(server.close);
  const socket = await open(Number(new URL(server.url).port));
  socket.write("GET /health HTTP/1.1\r\n");
  assert.equal((await fetch(new URL("/health", server.url))).status, 200);
  const stopped = stop(server.http);
  socket.write("host: localhost\r\n\r\n");
  assert.match(await text(socket), /^HTTP\/1.1 503 /);
  await stopped;
});

test("a promise that nobody awaited is a line in the log, an exception that nobody caught is the end", async (t) => {
  const script = join(import.meta.dirname, "support/faulty-server.ts");
  const port = await freePort();
  const url = `http://localhost:${port}/mcp`;
  const env = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url, PORT: String(port), DATABASE_URL: "memory:" };
  const { kill, lines, ready, exited } = spawnServer(env, undefined, script);
  t.after(() => kill("SIGKILL"));
  await ready;
  assert.match(lines.join("\n"), /Listening on/);

  kill("SIGHUP");
  await until(() => lines.some((line) => line.endsWith("Nobody awaited this")), "the line");
  assert.equal((await post(url, await tenant.sign({ aud: url }), "ping")).status, 200);
  assert.ok(!lines.some((line) => /^ +at /.test(line)), "no stack");

  kill("SIGUSR2");
  assert.equal(await exited, 1);
  assert.match(lines.join("\n"), /Error: Nobody caught this\n(.*\n)* +at .*faulty-server\.ts/);
});
