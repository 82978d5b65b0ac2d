/** Start and stop: settings, `.env`, the log, signals, uncaught errors. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdir, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import type { ServerResponse } from "node:http";
import { type AddressInfo, createServer as createNetServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test, type TestContext } from "node:test";
import { readEnvironment, readSettings, stop } from "../server.ts";
import { Connection, freePort, logOf, message, noSqlite, post, rawPost } from "./support/server.ts";
import { spawnServer, startServer, until } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";

const REQUIRED = { AUTH0_DOMAIN: "tenant.example.auth0.com", MCP_SERVER_URL: "https://mcp.example.com/mcp" };

const FAULTY_SERVER = join(import.meta.dirname, "support/faulty-server.ts");

const tenant = await startTenant();
const directory = await mkdtemp(join(tmpdir(), "start-"));

after(async () => {
  await tenant.close();
  await rm(directory, { recursive: true });
});

test("two settings are enough, and all others have defaults", () => {
  assert.deepEqual(readSettings(REQUIRED), {
    ...REQUIRED,
    issuer: "https://tenant.example.auth0.com/",
    PORT: 3000,
    HOST: "127.0.0.1",
    DATABASE_URL: noSqlite ? "memory:" : "file:tasks.db",
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
    MCP_SERVER_URL: ["https://your-domain.com/mcp", "https://your-domain.com:8443/mcp", "https://your-domain.com"],
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

test("a tenant and a server on loopback may be named by their origin, without https", () => {
  const hosts = ["localhost:4000", "app.localhost:4000", "127.0.0.1:4000", "127.1.2.3", "[::1]:4000"];
  for (const origin of hosts.map((host) => `http://${host}`)) {
    const settings = readSettings({ AUTH0_DOMAIN: origin, MCP_SERVER_URL: `${origin}/mcp` });
    assert.equal(settings.issuer, `${origin}/`);
    assert.equal(settings.MCP_SERVER_URL, `${origin}/mcp`);
  }
});

/** The error where only this setting is wrong. */
function refusalOf(name: string, value: string): string {
  try {
    readSettings({ ...REQUIRED, [name]: value });
  } catch (error) {
    return (error as Error).message;
  }
  return assert.fail(`${name}=${value} is accepted`);
}

test("a malformed setting is named, with what was found and what it must be", () => {
  const malformed: Record<string, string[]> = {
    AUTH0_DOMAIN: [
      "https://tenant.example.auth0.com",
      "http://localhost.evil.example",
      "tenant.example.auth0.com/",
      "http://localhost:4000/",
      "http://localhost:4000/path",
      "Tenant.example.auth0.com",
      "my tenant",
      "tenant",
      "127.0.0.1",
      "tenant.example.auth0.com:443",
      "tenant.example.auth0.com?x",
      "http://localhost:4000?x",
      "ftp://localhost",
    ],
    MCP_SERVER_URL: [
      "mcp.example.com/mcp",
      "http://mcp.example.com/mcp",
      "http://localhost.evil.example/mcp",
      "ftp://localhost/mcp",
      "https://mcp.example.com",
      "https://mcp.example.com/",
      "https://mcp.example.com/mcp/",
      "https://mcp.example.com/mcp?x=1",
      "https://mcp.example.com/mcp?",
      "https://mcp.example.com/mcp#top",
      "https://Mcp.example.com/mcp",
      "https://mcp.example.com:443/mcp",
      "https://mcp.example.com/a/../mcp",
    ],
    PORT: ["http", "0", "-1", "3000.5", "1e3", " 3000", "65536"],
    ENFORCE_SCOPES: ["yes", "TRUE", "1"],
    ALLOWED_ORIGINS: ["example.com", "https://example.com/", "https://example.com, *"],
    LOG_LEVEL: ["verbose"],
  };
  for (const [name, values] of Object.entries(malformed)) {
    for (const value of values) {
      const [found, expected, ...more] = refusalOf(name, value).split(/: (?=it must be )|\n/);
      assert.equal(found, `${name} is ${JSON.stringify(value)}`);
      assert.match(expected ?? "", /^it must be \w/);
      assert.deepEqual(more, []);
    }
  }
});

test("a password in a malformed setting is not shown, and of DATABASE_URL nothing is", () => {
  const hosts = ["https://user:hunter2@mcp.example.com", "https:user:hunter2@mcp.example.com", "a:hunter2@b"];
  for (const name of ["AUTH0_DOMAIN", "MCP_SERVER_URL", "ALLOWED_ORIGINS"]) {
    for (const host of hosts) assert.doesNotMatch(refusalOf(name, `${host}/mcp`), /hunter2/);
  }
  for (const url of ["mysql://user:hunter2@localhost/tasks", "hunter2.db", "file:", "memory", "postgres://a:b#c@d/e"]) {
    assert.match(refusalOf("DATABASE_URL", url), /^DATABASE_URL is malformed: it must be [^\n]*$/);
  }
});

async function writeEnvFile(t: TestContext, text: string) {
  const file = join(directory, ".env");
  await writeFile(file, text);
  t.after(() => rm(file, { recursive: true }));
}

/** What the server reads with this `.env`, and with these variables in the test's own environment. */
async function environmentOf(t: TestContext, file: string, real: Record<string, string> = {}) {
  await writeEnvFile(t, file);
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
  const { AUTH0_DOMAIN, LOG_LEVEL, PORT, HOST } = await environmentOf(t, lines.join("\r\n"));
  assert.deepEqual(
    { AUTH0_DOMAIN, LOG_LEVEL, PORT, HOST },
    { AUTH0_DOMAIN: "tenant.example.auth0.com", LOG_LEVEL: "debug", PORT: "81", HOST: process.env.HOST },
  );
});

test("without a .env file, or with a folder of that name, only the environment is read", async (t) => {
  await environmentOf(t, "");
  const file = join(directory, ".env");
  const environment = Object.fromEntries(Object.entries(process.env).filter(([, text]) => text));
  await rm(file);
  assert.deepEqual(readEnvironment(), environment);
  await mkdir(file); // as Docker does for a mount that it cannot find
  assert.deepEqual(readEnvironment(), environment);
});

test("the environment wins over .env, but not where it is empty", async (t) => {
  const real = { ENFORCE_SCOPES: "", PORT: "82", HOST: "0.0.0.0" };
  const env = await environmentOf(t, "ENFORCE_SCOPES=true\nPORT=81\nLOG_LEVEL=debug\nHOST=", real);
  assert.deepEqual([env.ENFORCE_SCOPES, env.PORT, env.LOG_LEVEL, env.HOST], ["true", "82", "debug", "0.0.0.0"]);
});

test("the server reads the .env of its working directory", async (t) => {
  const port = await freePort();
  const url = `http://localhost:${port}/from-file`;
  const file = { AUTH0_DOMAIN: tenant.origin, PORT: "81", DATABASE_URL: "memory:", MCP_SERVER_URL: url };
  await writeEnvFile(t, Object.entries(file).map((pair) => pair.join("=")).join("\n"));
  const { kill, ready } = spawnServer({ PORT: String(port) }, directory);
  t.after(() => kill("SIGKILL"));
  await ready;
  const reply = await fetch(`http://127.0.0.1:${port}/.well-known/oauth-protected-resource`);
  assert.equal((await reply.json()).resource, url);
});

test("missing and malformed settings stop the start with one line each, at every LOG_LEVEL", async () => {
  const { lines, exited } = spawnServer({
    PORT: "high",
    MCP_SERVER_URL: "https://your-domain.com/mcp",
    LOG_LEVEL: "silent",
  });
  assert.equal(await exited, 1);
  assert.equal(lines.length, 3, lines.join("\n"));
  assert.deepEqual(lines.map((line) => line.split(" ")[0]), ["AUTH0_DOMAIN", "MCP_SERVER_URL", "PORT"]);
});

test("a port that is in use stops the start with one line", async (t) => {
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
    const name = "no such\u2028tool\n\u001b[31m\u202e\u200b\u009b";
    const reply = await post(`${url}?secret=in-query`, sent, "tools/call", { name });
    await reply.text();
  }
  await (await fetch(url, { method: "DELETE", headers: { authorization: `Bearer ${token}` } })).text();
  return { log: lines.join(""), token };
}

test("LOG_LEVEL info logs refusals with their reason", async (t) => {
  const { log } = await logOfCalls(t, "info");
  assert.match(log, /^\S+Z POST \/mcp 401 \d+ ms Token's signature.*\n\S+Z DELETE \/mcp 405 .*\n$/);
});

test("LOG_LEVEL debug logs every request and its claims, without token, query or control characters", async (t) => {
  const { log, token } = await logOfCalls(t, "debug");
  const [first = "", second = "", third = ""] = log.split("\n");
  assert.match(
    first,
    / POST \/mcp tools\/call no\?such\?tool\?\?\[31m\?\?\? 200 \d+ ms auth0\|alice \{"iss":"http.*"azp":"chatgpt"/,
  );
  assert.match(second, / POST \/mcp 401 /);
  assert.match(third, / DELETE \/mcp 405 \d+ ms auth0\|alice Only POST/);
  for (const part of [...token.split("."), "in-query"]) assert.ok(!log.includes(part), part);
});

test("LOG_LEVEL silent logs nothing", async (t) => {
  assert.equal((await logOfCalls(t, "silent")).log, "");
});

/** For a server in a process of its own. */
async function processEnvironment() {
  const port = await freePort();
  const url = `http://localhost:${port}/mcp`;
  const DATABASE_URL = noSqlite ? "memory:" : "file:tasks.db";
  return { env: { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url, PORT: String(port), DATABASE_URL }, url, port };
}

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  test(`${signal} refuses connections, finishes the request in flight, closes the store, ends with 0`, async (t) => {
    const { env, url, port } = await processEnvironment();
    const { kill, lines, ready, exited } = spawnServer(env, directory);
    t.after(() => kill("SIGKILL"));
    await ready;
    assert.match(lines.join(), /Listening on 127\.0\.0\.1:\d+ for http/);

    const asked = new Promise<ServerResponse>((resolve) => tenant.answerJwks = resolve);
    t.after(() => tenant.answerJwks = undefined);
    const inFlight = new Connection(port);
    const request = rawPost(await tenant.sign({ aud: url }), message("ping"));
    const reply = inFlight.send(request.slice(0, -9));
    const keys = await asked; // so the request is in flight
    kill(signal);
    await until(() => lines.some((line) => line.endsWith(`Stopping on ${signal}`)), "it says that it stops");
    await assert.rejects(fetch(url));
    tenant.answerJwks = undefined;
    keys.end(await (await fetch(`${tenant.issuer}.well-known/jwks.json`)).text());
    inFlight.socket.write(request.slice(-9));
    assert.equal((await reply).status, 200);
    assert.equal(await exited, 0);
    // SQLite deletes its write-ahead log when the database is closed.
    assert.deepEqual((await readdir(directory)).filter((name) => name.endsWith("-wal")), []);
  });
}

test("SIGTERM ends the process with status 0 even if the database cannot be closed", { skip: noSqlite }, async (t) => {
  const { env } = await processEnvironment();
  const { kill, lines, ready, exited } = spawnServer({ ...env, CLOSE_HANGS: "true" }, directory, FAULTY_SERVER);
  t.after(() => kill("SIGKILL"));
  await ready;
  assert.match(lines.join("\n"), /Listening on/);
  let status: unknown;
  void exited.then((ended) => status = ended);
  kill("SIGTERM");
  await until(() => status !== undefined, "the process has ended");
  assert.equal(status, 0);
});

test("a client that never ends its request delays the stop by seconds at most", async (t) => {
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  t.after(server.close);
  const { socket } = new Connection(server.port);
  t.after(() => socket.destroy());
  socket.write("POST /mcp HTTP/1.1\r\nhost: localhost\r\n");
  assert.equal((await fetch(new URL("/health", server.url))).status, 200); // by now both connections are accepted
  t.mock.timers.enable({ apis: ["setTimeout", "setInterval"] });
  let hasStopped = false;
  void stop(server.http).then(() => hasStopped = true);
  t.mock.timers.tick(9_000);
  await until(() => hasStopped, "the server has stopped");
});

test("the health check of a server that is stopping answers 503", async (t) => {
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  t.after(server.close);
  const connection = new Connection(server.port);
  const reply = connection.send("GET /health HTTP/1.1\r\n");
  assert.equal((await fetch(new URL("/health", server.url))).status, 200);
  const stopped = stop(server.http);
  connection.socket.write("host: localhost\r\n\r\n");
  assert.equal((await reply).status, 503);
  await stopped;
});

test("an unhandled rejection is a line in the log, an uncaught exception ends the process with status 1", async (t) => {
  const { env, url } = await processEnvironment();
  const { kill, lines, ready, exited } = spawnServer(env, directory, FAULTY_SERVER);
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
