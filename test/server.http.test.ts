/** What the server answers before any tool runs, in the order of its checks. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { after, test } from "node:test";
import { gzipSync } from "node:zlib";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { clientHeaders, Connection, freePort, logOf, message, post, rawPost, startServer } from "./support/server.ts";
import type { Reply } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
const server = await startServer({
  AUTH0_DOMAIN: tenant.origin,
  ALLOWED_ORIGINS: "https://inspector.example, chrome-extension://abcdefghijklmnop",
  OPENAI_APPS_CHALLENGE: "f00d-Cafe_42",
});
Object.assign(tenant.settings, configuredTenant("permissive", server.url));
const token = await tenant.sign();

after(async () => {
  await server.close();
  await tenant.close();
});

const PING = { jsonrpc: "2.0", id: 1, method: "ping" };
const METADATA = "/.well-known/oauth-protected-resource";

/** A good request, with a test's changes. A header that is undefined is left out. */
function send({ method = "POST", body = PING, headers = {}, url = server.url }: {
  method?: string;
  body?: unknown;
  headers?: Record<string, string | undefined>;
  url?: string;
} = {}): Promise<Response> {
  const all = { ...clientHeaders(token), ...headers };
  const given = Object.entries(all).filter((entry): entry is [string, string] => entry[1] !== undefined);
  const content = typeof body === "string" || body instanceof ReadableStream ? body : JSON.stringify(body);
  return fetch(url, {
    method,
    headers: given,
    ...(method === "POST" ? { body: content, ...(content instanceof ReadableStream && { duplex: "half" }) } : {}),
  });
}

const at = (path: string) => new URL(path, server.url).href;

/** A ping with a target or headers that fetch would correct. */
async function sendRaw(target: string, headers: string[] = []): Promise<Reply> {
  const body = message("ping");
  const connection = new Connection(server.port);
  try {
    return await connection.send(
      rawPost(token, body, { target, extra: [`content-length: ${body.length}`, ...headers] }),
    );
  } finally {
    connection.close();
  }
}

async function errorOf(reply: Response): Promise<{ code: number; message: string }> {
  return (await reply.json()).error;
}

test("a call with a good token is answered in JSON", async () => {
  const reply = await send();
  assert.equal(reply.status, 200);
  assert.equal(reply.headers.get("content-type"), "application/json");
  assert.deepEqual(await reply.json(), { jsonrpc: "2.0", id: 1, result: {} });
});

test("a request without a token gets 401 and a challenge that names the scopes to ask for, and no error", async () => {
  const scope = "openid profile email offline_access";
  for (const method of ["POST", "GET", "DELETE", "PUT"]) {
    for (const authorization of [undefined, "Basic YTpi", "Bearer", "Bearer "]) {
      const reply = await send({ method, headers: { authorization } });
      assert.equal(reply.status, 401, `${method} ${authorization}`);
      assert.equal(
        reply.headers.get("www-authenticate"),
        `Bearer resource_metadata="${at(`${METADATA}/mcp`)}", scope="${scope}"`,
      );
    }
  }
});

test("a token in the query string is not a token", async () => {
  const reply = await send({
    url: `${server.url}?access_token=${token}`,
    headers: { authorization: undefined },
  });
  assert.equal(reply.status, 401);
});

test("the word Bearer may be in any case, with several blanks behind it", async () => {
  for (const scheme of ["bearer ", "BEARER ", "Bearer  "]) {
    assert.equal((await send({ headers: { authorization: scheme + token } })).status, 200, scheme);
  }
});

test("both addresses of the metadata document say where users sign in, to every origin", async () => {
  for (const path of [`${METADATA}/mcp`, METADATA]) {
    for (const headers of [{}, { origin: "https://claude.ai" }, { origin: "null" }]) {
      const reply = await fetch(at(path), { headers });
      assert.equal(reply.status, 200);
      assert.equal(reply.headers.get("access-control-allow-origin"), "*");
      assert.equal(reply.headers.get("cache-control"), "no-store");
      assert.deepEqual(await reply.json(), {
        resource: server.url,
        authorization_servers: [tenant.issuer],
        scopes_supported: ["openid", "profile", "email", "offline_access"],
        bearer_methods_supported: ["header"],
        resource_name: "Tasks",
      });
    }
  }
});

test("the metadata document and the health check answer GET and HEAD alone, and a preflight", async () => {
  for (const path of [`${METADATA}/mcp`, METADATA, "/health"]) {
    const [get, head] = await Promise.all(["GET", "HEAD"].map((method) => fetch(at(path), { method })));
    assert.equal(head?.status, 200, path);
    assert.equal(head?.headers.get("content-type"), get?.headers.get("content-type"), path);
    assert.equal((await fetch(at(path), { method: "OPTIONS" })).status, 204, path);
    for (const method of ["POST", "PUT", "DELETE"]) {
      const reply = await send({ method, url: at(path) });
      assert.equal(reply.status, 405, `${method} ${path}`);
      assert.equal(reply.headers.get("allow"), "GET, HEAD");
    }
  }
});

test("a page of any origin may ask for the metadata document with headers of its own", async () => {
  const reply = await preflight(at(`${METADATA}/mcp`), "https://claude.ai", "mcp-protocol-version");
  assert.equal(reply.status, 204);
  assert.equal(reply.headers.get("access-control-allow-origin"), "*");
  assert.match(reply.headers.get("access-control-allow-headers") ?? "", /mcp-protocol-version/i);
});

test("with ENFORCE_SCOPES the metadata document and the challenge ask for the API's permissions", async (t) => {
  const strict = await startServer({ AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true" });
  t.after(strict.close);
  const { scopes_supported } = await (await fetch(new URL(`${METADATA}/mcp`, strict.url))).json();
  assert.deepEqual(scopes_supported, ["tasks:read", "tasks:write", "offline_access"]);
  const reply = await send({ url: strict.url, headers: { authorization: undefined } });
  const challenge = reply.headers.get("www-authenticate") ?? "";
  assert.match(challenge, /, scope="tasks:read tasks:write offline_access"$/);
});

test("an origin that is not allowed gets 403 before anything else is looked at", async () => {
  const origins = [
    "https://evil.example",
    "null",
    "https://chatgpt.com.evil.example",
    "http://localhost.evil.example",
    "http://notlocalhost",
    "evil://localhost", // loopback is a host of http and https alone
    "javascript://127.0.0.1",
    "chrome-extension://other",
  ];
  for (const origin of origins) {
    for (const method of ["POST", "OPTIONS"]) {
      const reply = await send({ method, headers: { origin, authorization: undefined } });
      assert.equal(reply.status, 403, `${method} ${origin}`);
      assert.equal(reply.headers.get("access-control-allow-origin"), null);
      assert.match((await errorOf(reply)).message, /ALLOWED_ORIGINS/);
    }
  }
});

test("an allowed origin can read every reply, and the challenge of a refusal", async () => {
  const own = new URL(server.url).origin;
  const origins = [
    own,
    "https://chatgpt.com",
    "https://inspector.example",
    "chrome-extension://abcdefghijklmnop",
    "http://localhost:6274",
    "https://localhost",
    "http://app.localhost:3000", // RFC 6761
    "http://127.0.0.1:6274",
    "http://[::1]:1",
  ];
  for (const origin of origins) {
    for (const authorization of [`Bearer ${token}`, undefined]) {
      const reply = await send({ headers: { origin, authorization } });
      assert.equal(reply.status, authorization ? 200 : 401);
      assert.equal(reply.headers.get("access-control-allow-origin"), origin);
      assert.match(reply.headers.get("vary") ?? "", /\bOrigin\b/);
      assert.equal(reply.headers.get("access-control-expose-headers"), "WWW-Authenticate");
    }
  }
});

const preflight = (url: string, origin: string, headers: string) =>
  fetch(url, {
    method: "OPTIONS",
    headers: { origin, "access-control-request-method": "POST", "access-control-request-headers": headers },
  });

test("a browser's preflight needs no token, allows whatever headers it asks for, and is kept for a day", async () => {
  for (const asked of ["authorization,content-type,mcp-method,mcp-name", "authorization,x-of-tomorrow"]) {
    const reply = await preflight(server.url, "http://localhost:6274", asked);
    assert.equal(reply.status, 204);
    assert.equal(reply.headers.get("access-control-allow-origin"), "http://localhost:6274");
    assert.equal(reply.headers.get("access-control-max-age"), "86400");
    const list = (name: string) => (reply.headers.get(`access-control-allow-${name}`) ?? "").split(/, */);
    const allowed = list("headers").map((name) => name.toLowerCase());
    assert.deepEqual(asked.split(",").filter((name) => !allowed.includes(name)), []); // * excludes Authorization
    assert.deepEqual(["GET", "POST", "DELETE"].filter((method) => !list("methods").includes(method)), []);
  }
});

test("with a good token any method but POST gets 405, and no challenge", async () => {
  for (const method of ["GET", "DELETE", "PUT", "HEAD"]) {
    const reply = await send({ method });
    assert.equal(reply.status, 405, method);
    assert.equal(reply.headers.get("allow"), "POST");
    assert.equal(reply.headers.get("www-authenticate"), null);
  }
});

test("a body whose Content-Type is not JSON gets 415", async () => {
  for (const type of ["text/plain", "text/plain; a=application/json", "application/json-seq", undefined]) {
    const body = new ReadableStream({ start: (stream) => stream.close() }); // fetch gives strings a type of its own
    assert.equal((await send({ body, headers: { "content-type": type } })).status, 415, String(type));
  }
});

test("a compressed body gets 415 that says why", async () => {
  const body = new Blob([gzipSync(JSON.stringify(PING))]).stream();
  const reply = await send({ body, headers: { "content-encoding": "gzip" } });
  assert.equal(reply.status, 415);
  assert.match((await errorOf(reply)).message, /Content-Encoding/);
});

test("Content-Type and Content-Encoding may be in any case", async () => {
  for (const type of ["application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"]) {
    for (const encoding of ["identity", "Identity", ""]) {
      const reply = await send({ headers: { "content-type": type, "content-encoding": encoding } });
      assert.equal(reply.status, 200, `${type}, ${encoding}`);
    }
  }
});

test("the rest of a refused body is read, so that its connection serves the next request", async (t) => {
  const connection = new Connection(server.port);
  t.after(() => connection.close());
  const large = "x".repeat(8 * 1024 * 1024); // more than the sockets' buffers hold
  for (const [sent, status] of [["bad token", 401], [token, 413]] as const) {
    assert.equal((await connection.send(rawPost(sent, large))).status, status);
    assert.equal((await connection.send(rawPost(token, message("ping")))).status, 200);
  }
});

test("a byte order mark before the JSON does no harm", async () => {
  const body = new Blob(["\uFEFF", JSON.stringify(PING)]).stream();
  assert.equal((await send({ body })).status, 200);
});

test("a body that is not UTF-8 gets 400, so that nothing is stored damaged", async () => {
  const latin1 = Buffer.from(JSON.stringify({ ...PING, params: { name: "Caf\u00e9" } }), "latin1");
  const reply = await send({ body: new Blob([latin1]).stream() });
  assert.equal(reply.status, 400);
  assert.equal((await errorOf(reply)).code, -32700);
});

test("a body over 1 MiB gets 413, with a Content-Length or without", async () => {
  const large = JSON.stringify({ ...PING, params: { padding: "x".repeat(1024 * 1024) } });
  assert.equal((await send({ body: large })).status, 413);
  assert.equal((await send({ body: new Blob([large]).stream() })).status, 413);
});

test("a body of 1 MiB is taken", async () => {
  const frame = JSON.stringify({ ...PING, params: { padding: "" } });
  const body = JSON.stringify({ ...PING, params: { padding: "x".repeat(1024 * 1024 - frame.length) } });
  assert.equal(body.length, 1024 * 1024);
  assert.equal((await send({ body })).status, 200);
});

test("a body that is not JSON gets 400", async () => {
  for (const body of ["", "{", "hello", "{}{}"]) {
    const reply = await send({ body });
    assert.equal(reply.status, 400, body);
    assert.equal((await errorOf(reply)).code, -32700);
  }
});

test("JSON that is no message, or a batch of messages, gets 400 and the error -32600 with id null", async () => {
  const bodies = [
    { jsonrpc: "2.0", id: 7, method: 42 },
    { jsonrpc: "1.0", id: 0, method: "ping" },
    { jsonrpc: "2.0", id: 7, method: "ping", params: "none" },
    { jsonrpc: "2.0", id: null, method: "ping" },
    { jsonrpc: "2.0", id: { of: "another kind" }, method: "ping" },
    {},
    null,
    "7",
    '"text"',
    [],
    [PING],
    [PING, { ...PING, id: 2 }],
  ];
  for (const body of bodies) {
    const reply = await send({ body });
    assert.equal(reply.status, 400, JSON.stringify(body));
    const { error, ...rest } = await reply.json();
    assert.equal(error.code, -32600, JSON.stringify(body));
    assert.match(error.message, /batch/);
    assert.deepEqual(rest, { jsonrpc: "2.0", id: null });
  }
});

test("null counts as left out, for params, their fields, and those of _meta and capabilities", async () => {
  const [method, protocolVersion, clientInfo] = ["initialize", "2025-11-25", { name: "test", version: "1" }];
  const messages = [
    { ...PING, params: null },
    { ...PING, params: { _meta: null } },
    { ...PING, params: { _meta: { progressToken: null } } },
    { ...PING, method: "tools/list", params: null },
    { ...PING, method: "tools/list", params: { cursor: null } },
    { ...PING, method: "tools/call", params: { name: "get_profile", arguments: null } },
    { ...PING, method, params: { protocolVersion, clientInfo, capabilities: { roots: null, sampling: null } } },
    { ...PING, method, params: { protocolVersion, clientInfo: { ...clientInfo, title: null }, capabilities: {} } },
  ];
  for (const body of messages) {
    const reply = await send({ body });
    assert.equal(reply.status, 200, JSON.stringify(body));
    const { result } = await reply.json();
    assert.ok(result && !result.isError, JSON.stringify(body));
  }
  const notification = { jsonrpc: "2.0", method: "notifications/initialized", params: null };
  assert.equal((await send({ body: notification })).status, 202);
});

test("a call with the parameter task is served as any other, since the server declares no MCP tasks", async () => {
  for (const task of [{ ttl: 60_000 }, "soon"]) {
    const { result } = await (await send({
      body: { ...PING, method: "tools/call", params: { name: "get_profile", task } },
    })).json();
    assert.equal(result.structuredContent.id, "auth0|alice");
  }
});

test("the name of an unknown tool is shortened to well-formed text in the answer", async () => {
  const name = `${"n".repeat(99)}\u{1f4a5}`;
  const { result } = await (await post(server.url, token, "tools/call", { name })).json();
  assert.ok(result.isError && result.content[0].text.includes("n".repeat(99)));
  assert.ok(result.content[0].text.isWellFormed());
});

test("deeply nested JSON is answered, wherever in a message it is", async () => {
  const nested = `${"[".repeat(200_000)}${"]".repeat(200_000)}`;
  assert.equal((await send({ body: nested })).status, 400);
  assert.equal((await send({ body: `{"jsonrpc":"2.0","id":${nested},"method":"ping"}` })).status, 400);
  assert.equal((await send({ body: `{"jsonrpc":"2.0","id":1,"result":{"a":${nested}}}` })).status, 202);
  const reply = await send({ body: `{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":${nested}}}` });
  assert.equal(reply.status, 200);
  for (const name of [nested, '{"toString":1}']) {
    const reply = await send({ body: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":${name}}}` });
    assert.equal(reply.status, 200, name.slice(0, 20));
  }
  for (const params of [`{"_meta":{"a":${nested}}}`, `{"_meta":{"a":[null]},"capabilities":${nested}}`]) {
    const reply = await send({ body: `{"jsonrpc":"2.0","id":1,"method":"ping","params":${params}}` });
    assert.equal(reply.status, 200, params.slice(0, 40));
  }
});

test("a megabyte of what a client may say of itself gets a small answer", async () => {
  const wrong = JSON.stringify(Array.from({ length: 500_000 }, () => 1));
  const client = `{"name":"a","version":"1","icons":${wrong}}`;
  for (const about of [`"capabilities":{},"clientInfo":${client}`, `"capabilities":{"experimental":${wrong}}`]) {
    const params = `{"protocolVersion":"2025-11-25",${about}}`;
    const reply = await send({ body: `{"jsonrpc":"2.0","id":1,"method":"initialize","params":${params}}` });
    assert.ok((await reply.text()).length < 1_000);
  }
});

test("Accept is ignored, since there is one representation", async () => {
  for (const accept of ["application/json", "text/event-stream", "*/*", "text/html", ""]) {
    const reply = await send({ headers: { accept } });
    assert.equal(reply.status, 200, accept);
    assert.equal(reply.headers.get("content-type"), "application/json");
  }
});

test("the same MCP-Protocol-Version twice counts once, and two different ones get 400", async () => {
  const [older, newer] = ["mcp-protocol-version: 2025-06-18", "mcp-protocol-version: 2025-11-25"];
  assert.equal((await sendRaw("/mcp", [older, older])).status, 200);
  assert.equal((await sendRaw("/mcp", [`${older}, 2025-06-18`])).status, 200, "joined by a proxy");
  assert.equal((await sendRaw("/mcp", [older, newer])).status, 400);
});

test("the protocol's messages and errors are answered as the SDK's own transport answers them", async (t) => {
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
  const requests: Parameters<typeof send>[0][] = [
    { body: initialize },
    { body: initialize, headers: { "mcp-protocol-version": "1999-01-01" } },
    { headers: { "mcp-protocol-version": "2025-03-26" } },
    { headers: { "mcp-protocol-version": "2026-07-28" } },
    { body: { ...PING, method: "server/discover" }, headers: { "mcp-protocol-version": "2026-07-28" } },
    { body: notification },
    { body: { jsonrpc: "2.0", method: "notifications/cancelled", params: { requestId: 1 } } },
    { body: { jsonrpc: "2.0", id: 5, result: {} } },
    { body: { jsonrpc: "2.0", id: 5, error: { code: -1, message: "No" } } },
    { body: { ...PING, method: "no/such" } },
    { body: { ...PING, id: "text" } },
    { body: { ...PING, params: { _meta: { progressToken: 1 } } } },
  ];
  for (const request of requests) {
    const [ours, theirs] = await Promise.all([send(request), send({ ...request, url: referenceUrl })]);
    const name = JSON.stringify(request).slice(0, 200);
    assert.equal(ours.status, theirs.status, name);
    const [got, expected] = [await ours.text(), await theirs.text()];
    if (request?.body === initialize && ours.ok) continue; // with the name of another server
    assert.equal(got, expected, name);
  }
});

test("a slash at the end, doubled slashes and a whole URL as the target change nothing", async () => {
  const targets = ["/mcp/", "//mcp", "///mcp//", "/mcp?x=1", "http://elsewhere.example/mcp", "HTTP://LOCALHOST/mcp/"];
  for (const target of targets) assert.equal((await sendRaw(target)).status, 200, target);
  for (const path of ["/health/", "//health", `/${METADATA}//mcp/`]) {
    assert.equal((await fetch(new URL(server.url).origin + path)).status, 200, path);
  }
});

test("any other path, disguised ones too, gets 404 and the URL to paste into ChatGPT", async () => {
  const targets = ["/", "/other", "/mcp/other", "/MCP", `${METADATA}/other`, "//other.example/mcp", "/healthz", "*"];
  const disguises = ["/health/../mcp", "/./mcp", "/.well-known/%2e%2e/mcp", "/\\mcp", "/%6dcp", "/mcp%2f", "/mcp;x"];
  for (const target of [...targets, ...disguises]) {
    const { status, body } = await sendRaw(target);
    assert.equal(status, 404, target);
    assert.ok(body.toString().includes(`paste into ChatGPT is ${server.url}`), target);
  }
});

test("MCP is served at the path of MCP_SERVER_URL even where another document would be", async (t) => {
  const MCP_SERVER_URL = `http://localhost:${await freePort()}/health`;
  const { url, close } = await startServer({ AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL });
  t.after(close);
  assert.equal((await post(url, await tenant.sign({ aud: url }), "ping")).status, 200);
});

test("OpenAI's challenge is served as it was set, or not at all", async (t) => {
  const path = "/.well-known/openai-apps-challenge";
  const reply = await fetch(at(path));
  assert.equal(reply.status, 200);
  assert.match(reply.headers.get("content-type") ?? "", /^text\/plain/);
  assert.equal(await reply.text(), "f00d-Cafe_42");

  const without = await startServer({ AUTH0_DOMAIN: tenant.origin });
  t.after(without.close);
  assert.equal((await fetch(new URL(path, without.url))).status, 404);
});

test("the health check says ok, and 503 while the database does not answer, with the cause in the log", async (t) => {
  const reply = await fetch(at("/health"));
  assert.equal(reply.status, 200);
  assert.match(await reply.text(), /^ok\n?$/);
  const store = {
    ...server.store,
    check: () => Promise.reject(new Error("the database is gone")),
    close: () => Promise.resolve(),
  };
  const log = logOf(t);
  const sick = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" }, store);
  t.after(sick.close);
  assert.equal((await fetch(new URL("/health", sick.url))).status, 503);
  assert.match(log.join(""), /GET \/health 503 .*the database is gone\n$/);
});

test("an unexpected failure gets 500, with its text in the log and not in the reply", async (t) => {
  const log = logOf(t);
  const { url, close } = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" });
  t.after(close);
  t.mock.method(McpServer.prototype, "connect", () => Promise.reject(new Error("of an inner part")));
  const reply = await post(url, await tenant.sign({ aud: url }), "ping");
  assert.equal(reply.status, 500);
  assert.doesNotMatch(await reply.text(), /inner part/);
  assert.match(log.join(""), /POST \/mcp ping 500 .*of an inner part \{"iss":/);
});
