/** The HTTP table: what the server answers before any tool runs, in the order in which it checks. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import type { AddressInfo } from "node:net";
import { after, before, test } from "node:test";
import { gzipSync } from "node:zlib";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { Connection } from "./run/bench/load.ts";
import type { Reply } from "./run/bench/load.ts";
import { clientHeaders, logOf, startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

let tenant: Tenant;
let server: RunningServer;
let token: string;

before(async () => {
  tenant = await startTenant();
  server = await startServer({
    AUTH0_DOMAIN: tenant.origin,
    ALLOWED_ORIGINS: "https://inspector.example, chrome-extension://abcdefghijklmnop",
    OPENAI_APPS_CHALLENGE: "f00d-Cafe_42",
  });
  Object.assign(tenant.settings, configuredTenant("permissive", server.url));
  token = await tenant.sign();
});

after(async () => {
  await server.close();
  await tenant.close();
});

const PING = { jsonrpc: "2.0", id: 1, method: "ping" };
const METADATA = "/.well-known/oauth-protected-resource";

/** A good call, with what a test changes about it. An undefined header is left out. */
function call({ method = "POST", body = PING, headers = {}, url = server.url }: {
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

/** A ping as it goes over the wire, for what fetch would put right: headers that stand twice, a target of another form. */
async function send(target: string, headers: string[] = [`authorization: Bearer ${token}`]): Promise<Reply> {
  const body = JSON.stringify(PING);
  const fixed = ["host: localhost", "content-type: application/json", `content-length: ${body.length}`];
  const connection = new Connection(Number(new URL(server.url).port));
  try {
    return await connection.send(
      Buffer.from([`POST ${target} HTTP/1.1`, ...fixed, ...headers, "", body].join("\r\n")),
    );
  } finally {
    connection.close();
  }
}

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

test("a request without a token gets 401 and a challenge that names the scopes to ask for, and no error", async () => {
  const scope = "openid profile email offline_access";
  for (const method of ["POST", "GET", "DELETE", "PUT"]) {
    for (const authorization of [undefined, "Basic YTpi", "Bearer", "Bearer "]) {
      const reply = await call({ method, headers: { authorization } });
      assert.equal(reply.status, 401, `${method} ${authorization}`);
      assert.equal(
        reply.headers.get("www-authenticate"),
        `Bearer resource_metadata="${at(`${METADATA}/mcp`)}", scope="${scope}"`,
      );
    }
  }
});

test("two different Authorization headers get 400, since which one counts would be a guess", async () => {
  const good = `authorization: Bearer ${token}`;
  const other = `authorization: Bearer ${await tenant.sign({ sub: "auth0|bob" })}`;
  for (const headers of [[good, other], [other, good], [good, "authorization: Basic YTpi"]]) {
    const { status, body } = await send("/mcp", headers);
    assert.equal(status, 400, headers.join());
    assert.match(body.toString(), /Authorization/);
  }
  assert.equal((await send("/mcp", [good, good])).status, 200);
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
  const reply = await call({ url: strict.url, headers: { authorization: undefined } });
  const challenge = reply.headers.get("www-authenticate") ?? "";
  assert.match(challenge, /, scope="tasks:read tasks:write offline_access"$/);
});

test("an origin that is not allowed gets 403 before anything else is looked at", async () => {
  const origins = [
    "https://evil.example",
    "null",
    "https://chatgpt.com.evil.example",
    "http://localhost.evil.example",
    "evil://localhost", // loopback is a host of http and https alone
    "javascript://127.0.0.1",
    "chrome-extension://other",
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
    "chrome-extension://abcdefghijklmnop",
    "http://localhost:6274",
    "https://localhost",
    "http://127.0.0.1:6274",
    "http://[::1]:1",
  ];
  for (const origin of origins) {
    for (const authorization of [`Bearer ${token}`, undefined]) {
      const reply = await call({ headers: { origin, authorization } });
      assert.equal(reply.status, authorization ? 200 : 401);
      assert.equal(reply.headers.get("access-control-allow-origin"), origin);
      assert.match(reply.headers.get("vary") ?? "", /\bOrigin\b/);
      const exposed = reply.headers.get("access-control-expose-headers") ?? "";
      assert.deepEqual(exposed.split(", "), ["WWW-Authenticate", "Mcp-Session-Id", "MCP-Protocol-Version"]);
    }
  }
});

const preflight = (url: string, origin: string, headers: string) =>
  fetch(url, {
    method: "OPTIONS",
    headers: {
      origin,
      "access-control-request-method": "POST",
      "access-control-request-headers": headers,
    },
  });

test("a browser's preflight needs no token, and allows whatever headers it asks for", async () => {
  for (const asked of ["authorization,content-type,mcp-method,mcp-name", "authorization,x-of-tomorrow"]) {
    const reply = await preflight(server.url, "http://localhost:6274", asked);
    assert.equal(reply.status, 204);
    assert.equal(reply.headers.get("access-control-allow-origin"), "http://localhost:6274");
    const list = (name: string) => (reply.headers.get(`access-control-allow-${name}`) ?? "").split(/, */);
    const allowed = list("headers").map((name) => name.toLowerCase());
    assert.deepEqual(asked.split(",").filter((name) => !allowed.includes(name)), []); // * leaves Authorization out
    assert.deepEqual(["GET", "POST", "DELETE"].filter((method) => !list("methods").includes(method)), []);
  }
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

test("a compressed body gets 415 that says why", async () => {
  const reply = await call({
    body: new Blob([gzipSync(JSON.stringify(PING))]).stream(),
    headers: { "content-encoding": "gzip" },
  });
  assert.equal(reply.status, 415);
  assert.match(await message(reply), /Content-Encoding/);
  assert.equal((await call({ headers: { "content-encoding": "identity" } })).status, 200);
});

test("a byte order mark before the JSON does no harm", async () => {
  const body = new Blob(["\uFEFF", JSON.stringify(PING)]).stream();
  assert.equal((await call({ body })).status, 200);
});

test("a body that is not UTF-8 gets 400, so that nothing is stored damaged", async () => {
  const latin1 = Buffer.from(JSON.stringify({ ...PING, params: { name: "Caf\u00e9" } }), "latin1");
  const reply = await call({ body: new Blob([latin1]).stream() });
  assert.equal(reply.status, 400);
  assert.equal((await reply.json()).error.code, -32700);
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

test("JSON that is no message gets 400 and -32600, with its id where it has one", async () => {
  const bodies: [body: unknown, id: unknown][] = [
    [{ jsonrpc: "2.0", id: 7, method: 42 }, 7],
    [{ jsonrpc: "2.0", id: "seven", method: 42 }, "seven"],
    [{ jsonrpc: "1.0", id: 0, method: "ping" }, 0],
    [{ jsonrpc: "2.0", id: 7, method: "ping", params: "none" }, 7],
    [{ jsonrpc: "2.0", id: null, method: "ping" }, null],
    [{ jsonrpc: "2.0", id: { of: "another kind" }, method: "ping" }, null],
    [{}, null],
    [null, null],
    ["7", null],
    ['"text"', null],
  ];
  for (const [body, id] of bodies) {
    const reply = await call({ body });
    assert.equal(reply.status, 400, JSON.stringify(body));
    const { error, ...rest } = await reply.json();
    assert.equal(error.code, -32600, JSON.stringify(body));
    assert.deepEqual(rest, { jsonrpc: "2.0", id });
  }
});

test("a batch gets 400 and -32600, whatever is in it", async () => {
  for (const body of [[], [PING], [PING, { ...PING, id: 2 }]]) {
    const reply = await call({ body });
    assert.equal(reply.status, 400);
    const { error, id } = await reply.json();
    assert.equal(error.code, -32600);
    assert.match(error.message, /batch/i);
    assert.equal(id, null);
  }
});

test("params that are null count as left out", async () => {
  const reply = await call({ body: { ...PING, method: "tools/list", params: null } });
  assert.equal(reply.status, 200);
  assert.ok((await reply.json()).result.tools.length > 0);
  const notification = { jsonrpc: "2.0", method: "notifications/initialized", params: null };
  assert.equal((await call({ body: notification })).status, 202);
});

test("deeply nested JSON is answered, wherever it stands", async () => {
  const nested = `${"[".repeat(200_000)}${"]".repeat(200_000)}`;
  assert.equal((await call({ body: nested })).status, 400);
  assert.equal((await call({ body: `{"jsonrpc":"2.0","id":${nested},"method":"ping"}` })).status, 400);
  const reply = await call({ body: `{"jsonrpc":"2.0","id":1,"method":"ping","params":{"a":${nested}}}` });
  assert.equal(reply.status, 200);
  for (const name of [nested, '{"toString":1}']) {
    const reply = await call({ body: `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":${name}}}` });
    assert.equal(reply.status, 200, name.slice(0, 20));
  }
});

test("Accept is not looked at, since there is one representation", async () => {
  for (const accept of ["application/json", "text/event-stream", "*/*", "text/html", ""]) {
    const reply = await call({ headers: { accept } });
    assert.equal(reply.status, 200, accept);
    assert.equal(reply.headers.get("content-type"), "application/json");
  }
  assert.equal((await send("/mcp")).status, 200, "none");
});

test("the same MCP-Protocol-Version twice counts once, and two different ones get 400", async () => {
  const [older, newer] = ["mcp-protocol-version: 2025-06-18", "mcp-protocol-version: 2025-11-25"];
  const send2 = (...headers: string[]) => send("/mcp", [`authorization: Bearer ${token}`, ...headers]);
  assert.equal((await send2(older, older)).status, 200);
  assert.equal((await send2(`${older}, 2025-06-18`)).status, 200, "joined by a proxy");
  assert.equal((await send2(older, newer)).status, 400);
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
    const [ours, theirs] = await Promise.all([call(request), call({ ...request, url: referenceUrl })]);
    const name = JSON.stringify(request).slice(0, 200);
    assert.equal(ours.status, theirs.status, name);
    const [got, expected] = [await ours.text(), await theirs.text()];
    if (request?.body === initialize && ours.ok) continue; // another server's name, of course
    assert.equal(got, expected, name);
  }
});

test("a slash at the end, doubled slashes and a whole URL as the target change nothing", async () => {
  const targets = [
    "/mcp/",
    "//mcp",
    "///mcp//",
    "/mcp?x=1",
    "http://elsewhere.example/mcp",
    "HTTP://LOCALHOST/mcp/",
  ];
  for (const target of targets) assert.equal((await send(target)).status, 200, target);
  for (const path of ["/health/", "//health", `/${METADATA}//mcp/`]) {
    assert.equal((await fetch(at("/").slice(0, -1) + path)).status, 200, path);
  }
});

test("an unknown path gets 404", async () => {
  for (
    const path of ["/other", "/mcp/other", "/MCP", `${METADATA}/other`, "//other.example/mcp", "/healthz"]
  ) {
    assert.equal((await fetch(at("/").slice(0, -1) + path)).status, 404, path);
  }
  assert.equal((await send("*")).status, 404);
});

test("the first page says what this is and which URL to paste", async () => {
  const reply = await fetch(at("/"));
  assert.equal(reply.status, 200);
  assert.match(reply.headers.get("content-type") ?? "", /^text\/plain/);
  assert.ok((await reply.text()).includes(`\n  ${server.url}\n`));
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
