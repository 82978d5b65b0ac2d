/** The HTTP table: what the server answers before any tool runs, in the order in which it checks. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, test } from "node:test";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

let tenant: Tenant;
let server: RunningServer;
let token: string;

before(async () => {
  tenant = await startTenant();
  server = await startServer({ AUTH0_DOMAIN: tenant.origin, ALLOWED_ORIGINS: "https://inspector.example" });
  Object.assign(tenant.settings, configuredTenant("permissive", server.url));
  token = await tenant.sign();
});

after(async () => {
  await server.close();
  await tenant.close();
});

const PING = { jsonrpc: "2.0", id: 1, method: "ping" };

/** A good call, with what a test changes about it. An undefined header is left out. */
function call({ method = "POST", body = PING, headers = {}, url = server.url }: {
  method?: string;
  body?: unknown;
  headers?: Record<string, string | undefined>;
  url?: string;
} = {}): Promise<Response> {
  const all = {
    authorization: `Bearer ${token}`,
    accept: "application/json, text/event-stream",
    "content-type": "application/json",
    ...headers,
  };
  const given = Object.entries(all).filter((entry): entry is [string, string] => entry[1] !== undefined);
  const content = typeof body === "string" || body instanceof ReadableStream ? body : JSON.stringify(body);
  return fetch(url, {
    method,
    headers: given,
    ...(method === "POST"
      ? { body: content, ...(content instanceof ReadableStream && { duplex: "half" }) }
      : {}),
  });
}

const at = (path: string) => new URL(path, server.url).href;

async function message(reply: Response): Promise<string> {
  const { error } = await reply.json();
  return error.message;
}

test("a call with a good token is answered in JSON", async () => {
  const reply = await call();
  assert.equal(reply.status, 200);
  assert.equal(reply.headers.get("content-type"), "application/json");
  assert.deepEqual(await reply.json(), { jsonrpc: "2.0", id: 1, result: {} });
});

test("a request without a token gets 401 and a challenge that names no error", async () => {
  for (const method of ["POST", "GET", "DELETE", "PUT"]) {
    for (const authorization of [undefined, "Basic YTpi", "Bearer", "Bearer "]) {
      const reply = await call({ method, headers: { authorization } });
      assert.equal(reply.status, 401, `${method} ${authorization}`);
      assert.equal(
        reply.headers.get("www-authenticate"),
        `Bearer resource_metadata="${at("/.well-known/oauth-protected-resource/mcp")}"`,
      );
    }
  }
});

test("a token in the query string is not a token", async () => {
  const reply = await call({
    url: `${server.url}?access_token=${token}`,
    headers: { authorization: undefined },
  });
  assert.equal(reply.status, 401);
});

test("the word Bearer may be written in any case", async () => {
  assert.equal((await call({ headers: { authorization: `bearer ${token}` } })).status, 200);
});

test("both addresses of the metadata document say where users sign in", async () => {
  for (const path of ["/.well-known/oauth-protected-resource/mcp", "/.well-known/oauth-protected-resource"]) {
    const reply = await fetch(at(path));
    assert.equal(reply.status, 200);
    assert.equal(reply.headers.get("cache-control"), "no-store");
    assert.deepEqual(await reply.json(), {
      resource: server.url,
      authorization_servers: [tenant.issuer],
      scopes_supported: ["openid", "profile", "email", "offline_access"],
      bearer_methods_supported: ["header"],
      resource_name: "Tasks",
    });
  }
});

test("with ENFORCE_SCOPES the metadata document asks for the API's permissions", async (t) => {
  const strict = await startServer({ AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true" });
  t.after(strict.close);
  const reply = await fetch(new URL("/.well-known/oauth-protected-resource/mcp", strict.url));
  const { scopes_supported } = await reply.json();
  assert.deepEqual(scopes_supported, ["tasks:read", "tasks:write", "offline_access"]);
});

test("an origin that is not allowed gets 403 before anything else is looked at", async () => {
  const origins = [
    "https://evil.example",
    "null",
    "https://chatgpt.com.evil.example",
    "http://localhost.evil.example",
  ];
  for (const origin of origins) {
    for (const method of ["POST", "OPTIONS"]) {
      const reply = await call({ method, headers: { origin, authorization: undefined } });
      assert.equal(reply.status, 403, `${method} ${origin}`);
      assert.equal(reply.headers.get("access-control-allow-origin"), null);
      assert.match(await message(reply), /ALLOWED_ORIGINS/);
    }
  }
});

test("an allowed origin can read every reply, a refusal's challenge too", async () => {
  const own = new URL(server.url).origin;
  const origins = [
    own,
    "https://chatgpt.com",
    "https://inspector.example",
    "http://127.0.0.1:6274",
    "http://[::1]:1",
  ];
  for (const origin of origins) {
    for (const authorization of [`Bearer ${token}`, undefined]) {
      const reply = await call({ headers: { origin, authorization } });
      assert.equal(reply.status, authorization ? 200 : 401);
      assert.equal(reply.headers.get("access-control-allow-origin"), origin);
      assert.equal(reply.headers.get("vary"), "Origin");
      const exposed = reply.headers.get("access-control-expose-headers") ?? "";
      assert.deepEqual(exposed.split(", "), ["WWW-Authenticate", "Mcp-Session-Id", "MCP-Protocol-Version"]);
    }
  }
});

test("a browser's preflight needs no token", async () => {
  const reply = await call({
    method: "OPTIONS",
    headers: { origin: "https://chatgpt.com", authorization: undefined },
  });
  assert.equal(reply.status, 204);
  assert.match(reply.headers.get("access-control-allow-headers") ?? "", /Authorization, Content-Type/);
});

test("any method but POST gets 405, once the caller is known", async () => {
  for (const method of ["GET", "DELETE", "PUT", "HEAD"]) {
    const reply = await call({ method });
    assert.equal(reply.status, 405, method);
    assert.equal(reply.headers.get("allow"), "POST");
  }
});

test("a body that does not call itself JSON gets 415", async () => {
  for (const type of ["text/plain", "text/plain; a=application/json", undefined]) {
    const body = new ReadableStream({ start: (stream) => stream.close() }); // fetch gives strings a type of its own
    assert.equal((await call({ body, headers: { "content-type": type } })).status, 415, String(type));
  }
  assert.equal((await call({ headers: { "content-type": "application/json; charset=utf-8" } })).status, 200);
});

test("a body over 1 MiB gets 413, with a Content-Length or without", async () => {
  const large = JSON.stringify({ ...PING, params: { padding: "x".repeat(1024 * 1024) } });
  assert.equal((await call({ body: large })).status, 413);
  assert.equal((await call({ body: new Blob([large]).stream() })).status, 413);
});

test("a body of 1 MiB is taken", async () => {
  const frame = JSON.stringify({ ...PING, params: { padding: "" } });
  const body = JSON.stringify({ ...PING, params: { padding: "x".repeat(1024 * 1024 - frame.length) } });
  assert.equal(body.length, 1024 * 1024);
  assert.equal((await call({ body })).status, 200);
});

test("a body that is not JSON gets 400", async () => {
  for (const body of ["", "{", "hello", "{}{}"]) {
    const reply = await call({ body });
    assert.equal(reply.status, 400, body);
    assert.equal((await reply.json()).error.code, -32700);
  }
});

test("deeply nested JSON is answered, whatever is in it", async () => {
  const depth = 200_000;
  const nested = "[".repeat(depth) + "]".repeat(depth);
  assert.equal((await call({ body: nested })).status, 400);
  const params = `{"name":"create_task","arguments":{"title":${nested}}}`;
  const reply = await call({ body: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":${params}}` });
  assert.equal((await reply.json()).result.isError, true);
});

test("the protocol's own checks answer as the SDK's transport does", async (t) => {
  const reference = createHttpServer(async (request, response) => {
    const mcp = new McpServer({ name: "reference", version: "1.0.0" });
    mcp.registerTool("echo", {}, () => ({ content: [] }));
    const transport = new StreamableHTTPServerTransport({ enableJsonResponse: true });
    response.on("close", () => void mcp.close());
    // The SDK's class declares `onclose` without `undefined`, which exactOptionalPropertyTypes tells apart.
    await mcp.connect(transport as Parameters<typeof mcp.connect>[0]);
    await transport.handleRequest(request, response);
  }).listen(0, "127.0.0.1");
  await once(reference, "listening");
  t.after(() => {
    reference.close();
    reference.closeAllConnections();
  });
  const referenceUrl = `http://127.0.0.1:${(reference.address() as AddressInfo).port}/mcp`;

  const initialize = {
    jsonrpc: "2.0",
    id: 1,
    method: "initialize",
    params: { protocolVersion: "2025-11-25", capabilities: {}, clientInfo: { name: "test", version: "1" } },
  };
  const notification = { jsonrpc: "2.0", method: "notifications/initialized" };
  const requests: Parameters<typeof call>[0][] = [
    { headers: { accept: "application/json" } },
    { headers: { accept: "text/event-stream" } },
    { headers: { accept: "*/*" } },
    { headers: { "mcp-protocol-version": "2026-07-28" } },
    { headers: { "mcp-protocol-version": "2025-06-18" } },
    { body: { ...PING, method: "server/discover" }, headers: { "mcp-protocol-version": "2026-07-28" } },
    { body: initialize, headers: { "mcp-protocol-version": "1999-01-01" } },
    { body: [initialize, PING] },
    { body: notification },
    { body: [] },
    { body: [PING] },
    { body: [notification, PING] },
    { body: Array(101).fill(PING) },
    { body: { jsonrpc: "1.0", id: 1, method: "ping" } },
    { body: { jsonrpc: "2.0", id: null, method: "ping" } },
    { body: null },
    { body: "7" },
    { body: { ...PING, method: "no/such" } },
    { body: { ...PING, method: "tools/call", params: { name: "no_such_tool" } } },
    { body: { ...PING, method: "tools/call" } },
    { body: { jsonrpc: "2.0", id: 5, result: {} } },
  ];
  for (const request of requests) {
    const [ours, theirs] = await Promise.all([call(request), call({ ...request, url: referenceUrl })]);
    const name = JSON.stringify(request).slice(0, 200);
    assert.equal(ours.status, theirs.status, name);
    const [got, expected] = [await ours.text(), await theirs.text()];
    if (request?.body === initialize && ours.ok) continue; // another server's name, of course
    assert.equal(got, expected, name);
  }
});

test("a batch gets the reply to each of its requests", async () => {
  const reply = await call({ body: [PING, { ...PING, id: "two" }] });
  const replies: { id: unknown }[] = await reply.json();
  assert.deepEqual(replies.map(({ id }) => id).sort(), [1, "two"]);
});

test("an unknown path gets 404", async () => {
  for (const path of ["/other", "/mcp/", "/.well-known/oauth-protected-resource/other"]) {
    assert.equal((await fetch(at(path))).status, 404, path);
  }
});

test("the first page says what this is and which URL to paste", async () => {
  const reply = await fetch(at("/"));
  assert.equal(reply.status, 200);
  assert.ok((await reply.text()).includes(`\n  ${server.url}\n`));
});

test("the health check says ok, and 503 while the store takes no writes", async (t) => {
  assert.equal(await (await fetch(at("/healthz"))).text(), "ok\n");
  const store = {
    ...server.store,
    check: () => Promise.reject(new Error("disk full")),
    close: () => Promise.resolve(),
  };
  const sick = await startServer({ AUTH0_DOMAIN: tenant.origin }, store);
  t.after(sick.close);
  assert.equal((await fetch(new URL("/healthz", sick.url))).status, 503);
});
