/** Start and stop: settings, `.env`, the log, signals. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer as createNetServer } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { readSettings } from "../server.ts";
import { freePort, post, spawnServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

const REQUIRED = { AUTH0_DOMAIN: "your-tenant.us.auth0.com", MCP_SERVER_URL: "https://your-domain.com/mcp" };

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
    issuer: "https://your-tenant.us.auth0.com/",
    serverUrl: "https://your-domain.com/mcp",
    port: 3000,
    host: "127.0.0.1",
    databaseUrl: undefined,
    enforceScopes: false,
    allowedOrigins: [],
    logLevel: "info",
  });
});

test("a setting that is empty counts as not set", () => {
  const empty = {
    PORT: "",
    HOST: "",
    DATABASE_URL: "",
    ENFORCE_SCOPES: "",
    ALLOWED_ORIGINS: "",
    LOG_LEVEL: "",
  };
  assert.deepEqual(readSettings({ ...REQUIRED, ...empty }), readSettings(REQUIRED));
  assert.throws(() => readSettings({ ...REQUIRED, AUTH0_DOMAIN: "" }), /AUTH0_DOMAIN is missing/);
});

test("a stand-in tenant is named by its origin, on loopback only", () => {
  for (const origin of ["http://localhost:4000", "http://127.0.0.1:4000", "http://[::1]:4000"]) {
    assert.equal(readSettings({ ...REQUIRED, AUTH0_DOMAIN: origin }).issuer, `${origin}/`);
  }
});

test("a malformed setting is named, with what it must look like", () => {
  const malformed: Record<string, string[]> = {
    AUTH0_DOMAIN: [
      "https://your-tenant.us.auth0.com",
      "http://your-tenant.us.auth0.com",
      "your-tenant.us.auth0.com/",
      "Your-Tenant.us.auth0.com",
      "your tenant",
      "tenant",
      "http://localhost:4000/",
      "http://localhost:4000/path",
      "http://localhost.evil.example",
    ],
    MCP_SERVER_URL: [
      "your-domain.com/mcp",
      "http://your-domain.com/mcp",
      "https://your-domain.com",
      "https://your-domain.com/",
      "https://your-domain.com/mcp/",
      "https://your-domain.com/mcp?x=1",
      "https://your-domain.com/mcp#top",
      "https://user:password@your-domain.com/mcp",
      "https://Your-Domain.com/mcp",
      "https://your-domain.com:443/mcp",
      "https://your-domain.com/a/../mcp",
      "ftp://your-domain.com/mcp",
    ],
    PORT: ["http", "-1", "65536", "3000.5", "1e3", " 3000"],
    DATABASE_URL: ["tasks.db", "mysql://localhost/tasks", "file:", "memory"],
    ENFORCE_SCOPES: ["yes", "TRUE", "1"],
    ALLOWED_ORIGINS: ["example.com", "https://example.com/", "https://example.com, *"],
    LOG_LEVEL: ["verbose"],
  };
  for (const [name, values] of Object.entries(malformed)) {
    for (const value of values) {
      assert.throws(
        () => readSettings({ ...REQUIRED, [name]: value }),
        ({ message }: Error) => message.startsWith(`${name} is `) && message.includes(": it must be "),
        `${name}=${value}`,
      );
    }
  }
});

test("a database's password is not repeated", () => {
  const env = { ...REQUIRED, DATABASE_URL: "mysql://user:hunter2@localhost/tasks" };
  assert.throws(() => readSettings(env), ({ message }: Error) => !message.includes("hunter2"));
});

test("the start stops with one line a value that is missing or malformed", async () => {
  const { lines, exited } = spawnServer({ PORT: "high", LOG_LEVEL: "silent" });
  assert.equal(await exited, 1);
  assert.equal(lines.length, 3, lines.join("\n"));
  assert.deepEqual(lines.map((line) => line.split(" ")[0]), ["AUTH0_DOMAIN", "MCP_SERVER_URL", "PORT"]);
});

test("a port in use is one clear line", async (t) => {
  const other = createNetServer().listen(0, "127.0.0.1");
  t.after(() => other.close());
  await once(other, "listening");
  const { port } = other.address() as AddressInfo;
  const env = { ...REQUIRED, PORT: String(port), DATABASE_URL: "memory:" };
  const { lines, exited } = spawnServer(env);
  assert.equal(await exited, 1);
  assert.deepEqual(lines, [`Cannot listen on 127.0.0.1:${port}: the port is in use. Set PORT to another`]);
});

test("a .env is read, and the real environment wins", async (t) => {
  const [inFile, real] = [await freePort(), await freePort()];
  const file = {
    ...REQUIRED,
    PORT: inFile,
    DATABASE_URL: "memory:",
    MCP_SERVER_URL: `http://localhost:${inFile}/from-file`,
  };
  await writeFile(join(directory, ".env"), Object.entries(file).map((pair) => pair.join("=")).join("\n"));
  const { kill, ready, exited } = spawnServer({ PORT: String(real) }, directory);
  t.after(() => kill("SIGKILL"));
  await ready;
  const reply = await fetch(`http://127.0.0.1:${real}/.well-known/oauth-protected-resource`);
  assert.equal((await reply.json()).resource, `http://localhost:${inFile}/from-file`);
  kill("SIGTERM");
  assert.equal(await exited, 0);
});

/** A server that writes what `level` lets through, after one good and one refused call; and what it wrote. */
async function logOf(level: string): Promise<{ log: string; token: string }> {
  const port = await freePort();
  const url = `http://localhost:${port}/mcp`;
  const env = {
    AUTH0_DOMAIN: tenant.origin,
    MCP_SERVER_URL: url,
    PORT: String(port),
    DATABASE_URL: "memory:",
    LOG_LEVEL: level,
  };
  const { kill, lines, ready, exited } = spawnServer(env);
  if (level !== "silent") await ready;
  // A silent server cannot say when it listens: it is asked until it answers.
  while (!await fetch(`http://localhost:${port}/healthz`).then(({ ok }) => ok, () => false));
  const token = await tenant.sign({ aud: url, azp: "chatgpt" });
  for (const sent of [token, `${token}x`]) {
    await post(`${url}?secret=in-query`, sent, "tools/call", { name: "list_tasks\n\u001b[31m" });
  }
  kill("SIGTERM");
  assert.equal(await exited, 0);
  return { log: lines.join("\n"), token };
}

test("the log at info has start, stop and refusals with their reason", async () => {
  const { log } = await logOf("info");
  assert.match(log, /Listening on .*\n.*POST \/mcp 401 \d+ ms Token's signature.*\n.*Stopping on SIGTERM$/);
});

test("the log at debug has every request, with the claims that decide", async () => {
  const { log } = await logOf("debug");
  assert.match(
    log,
    /POST \/mcp tools\/call list_tasks\?\?\[31m 200 \d+ ms auth0\|alice \{"iss":"http.*"azp":"chatgpt"/,
  );
});

test("the log at silent is silent", async () => {
  assert.equal((await logOf("silent")).log, "");
});

test("the log never holds a token, a query or what a client smuggles in", async () => {
  const { log, token } = await logOf("debug");
  for (const part of token.split(".")) assert.ok(!log.includes(part));
  assert.ok(!log.includes("in-query") && !log.includes("\u001b"));
});

test("SIGINT and SIGTERM end the server with status 0", async () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    const { kill, ready, exited } = spawnServer({ ...REQUIRED, PORT: "0", DATABASE_URL: "memory:" });
    await ready;
    kill(signal);
    assert.equal(await exited, 0);
  }
});
