/** Clients at fault: others go on being served, and nothing is left open. Raw sockets, since no client library errs so. */
import assert from "node:assert/strict";
import { once } from "node:events";
import type { ServerResponse } from "node:http";
import type { Socket } from "node:net";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { createServer } from "../server.ts";
import { clientHeaders, logOf, open, post, startServer, until } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

let tenant: Tenant;
let server: RunningServer;
let token: string;
let port: number;

before(async () => {
  tenant = await startTenant();
});

after(() => tenant.close());

beforeEach(async () => {
  server = await startServer(
    { AUTH0_DOMAIN: tenant.origin },
    undefined,
    // Looks for clients that are late every 50 ms, or the test of them would take long.
    (...given) => Object.assign(createServer(...given), { connectionsCheckingInterval: 50 }),
  );
  port = Number(new URL(server.url).port);
  token = await tenant.sign({ aud: server.url });
});

afterEach(() => server.close());

/** Others go on being served, which each test ends with. */
async function assertServing() {
  const reply = await post(server.url, token, "ping");
  assert.equal(reply.status, 200);
  await reply.text();
}

const message = (method: string, params = {}, id = 1) => JSON.stringify({ jsonrpc: "2.0", id, method, params });

/** A request as it goes over the wire. */
function wire(body: string, extra: string[] = [`content-length: ${Buffer.byteLength(body)}`]): string {
  const lines = Object.entries(clientHeaders(token)).map((pair) => pair.join(": "));
  return ["POST /mcp HTTP/1.1", "host: localhost", ...lines, ...extra, "", body].join("\r\n");
}

/** The last request of its connection. */
const last = (body: string, extra: string[] = []) =>
  wire(body, [...extra, `content-length: ${body.length}`, "connection: close"]);

/** All that comes back until the server ends the connection. */
async function readAll(socket: Socket): Promise<string> {
  let text = "";
  socket.on("data", (chunk: Buffer) => text += chunk.toString());
  await new Promise((resolve) => socket.on("close", resolve)); // once would reject where it is reset
  return text;
}

const openConnections = ({ http }: RunningServer) =>
  new Promise<number>((resolve, reject) =>
    http.getConnections((error, count) => error ? reject(error) : resolve(count))
  );

const nothingOpen = (of = server) => until(async () => await openConnections(of) === 0, "nothing is open");

/** A list of tasks that waits until it is told to go on. */
function waitingList() {
  const { promise: asked, resolve: ask } = later();
  const { promise: told, resolve: goOn } = later();
  const list = async () => {
    ask();
    await told;
    return [];
  };
  return { asked, goOn, list };
}

function later() {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => resolve = settle);
  return { promise, resolve };
}

const listTasks = message("tools/call", { name: "list_tasks", arguments: {} });

test("every wait for a client is bounded", () => {
  const { headersTimeout, requestTimeout, keepAliveTimeout, timeout } = server.http;
  assert.ok([headersTimeout, requestTimeout, keepAliveTimeout, timeout].every((limit) => limit > 0));
});

test("clients that never end their headers or their body are cut off", async () => {
  const { headersTimeout, requestTimeout } = server.http;
  Object.assign(server.http, { headersTimeout: 100, requestTimeout: 200 }); // shorter, or the test would take long
  const slowHeaders = await open(port);
  slowHeaders.write("POST /mcp HTTP/1.1\r\nhost: localhost\r\nx-slow: ");
  const slowBody = await open(port);
  slowBody.write(wire("{", ["content-length: 1000"]));
  const answers = [readAll(slowHeaders), readAll(slowBody)];
  for (const answer of await Promise.all(answers)) assert.match(answer, /^HTTP\/1.1 408 /);
  Object.assign(server.http, { headersTimeout, requestTimeout }); // on a busy machine others would be too slow as well
  await assertServing();
});

test("a client that closes its half of the connection leaves nothing open", async () => {
  const socket = await open(port);
  socket.end(wire("{", ["content-length: 1000"]));
  await nothingOpen();
  await assertServing();
});

test("a client that goes in the middle of its body leaves nothing open", async () => {
  for (const leave of ["destroy", "resetAndDestroy"] as const) {
    const socket = await open(port);
    socket.write(wire("{", ["content-length: 1000"]));
    await until(async () => await openConnections(server) === 1, "the client is there");
    socket[leave]();
    await nothingOpen();
  }
  await assertServing();
});

for (const part of ["half", "all"]) {
  test(`a client that has sent ${part} of its body and goes while the signing keys are being fetched leaves nothing open, and the log says so`, async (t) => {
    const keySet = await (await fetch(`${tenant.issuer}.well-known/jwks.json`)).text();
    const asked = new Promise<ServerResponse>((resolve) => tenant.answerJwks = resolve);
    t.after(() => tenant.answerJwks = undefined);
    const log = logOf(t);
    const cold = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "debug" }); // knows no key yet
    t.after(cold.close);
    token = await tenant.sign({ aud: cold.url });

    const body = message("ping");
    const socket = await open(Number(new URL(cold.url).port));
    socket.write(wire(part === "half" ? body.slice(0, 10) : body, [`content-length: ${body.length}`]));
    const response = await asked;
    socket.resetAndDestroy();
    await nothingOpen(cold);
    response.end(keySet);

    await until(() => log.length > 0, "a line in the log");
    assert.match(log.join(""), /^\S+ POST \/mcp .*gone.*\n$/);
  });
}

test("a tool whose client goes learns it through the SDK's signal, harms nobody, and is a line in the log", async (t) => {
  const { asked, goOn, list } = waitingList();
  const log = logOf(t);
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "debug" });
  t.after(server.close);
  t.mock.method(server.store, "list", list);
  token = await tenant.sign({ aud: server.url });
  const { mock } = t.mock.method(AbortController.prototype, "abort");
  const isSdk = ({ stack }: { stack: Error }) => stack.stack?.includes("@modelcontextprotocol/sdk");
  const socket = await open(Number(new URL(server.url).port));
  socket.write(wire(listTasks));
  await asked;
  socket.resetAndDestroy();
  await until(() => mock.calls.some(isSdk), "the SDK aborts the call");
  await nothingOpen(server);
  assert.match(log.join(""), /^\S+ POST \/mcp tools\/call list_tasks the client has gone .* auth0\|alice \{.*\n$/);
  goOn(); // the tool ends, and there is nobody to answer
  assert.equal((await post(server.url, token, "ping")).status, 200);
});

test("a slow tool call keeps nobody else waiting", async (t) => {
  const { asked, goOn, list } = waitingList();
  t.mock.method(server.store, "list", list);
  const slow = post(server.url, token, "tools/call", { name: "list_tasks", arguments: {} });
  await asked;
  await assertServing();
  goOn();
  assert.equal((await slow).status, 200);
});

test("pipelined requests are answered each, and in their order", async () => {
  const socket = await open(port);
  const requests = [1, 2, 3].map((id) => wire(message("ping", {}, id)));
  socket.write(requests.join("") + last(listTasks));
  const answer = await readAll(socket);
  const ids = [...answer.matchAll(/"id":(\d)/g)].map(([, id]) => id);
  assert.deepEqual(ids, ["1", "2", "3", "1"]);
});

test("conflicting headers are refused", async () => {
  const body = message("ping");
  const length = `content-length: ${body.length}`;
  for (const extra of [[length, "content-length: 1"], [length, "transfer-encoding: chunked"], ["content-length: -1"]]) {
    const socket = await open(port);
    socket.write(wire(body, extra));
    assert.match(await readAll(socket), /^HTTP\/1.1 400 /, extra.join());
  }
  await assertServing();
});

test("headers over 16 KiB are refused", async () => {
  const socket = await open(port);
  socket.write(wire("", [`x-padding: ${"x".repeat(17_000)}`, "content-length: 0"]));
  assert.match(await readAll(socket), /^HTTP\/1.1 431 /);
  await assertServing();
});

test("thousands of connections, opened and dropped, leave no memory behind", async () => {
  setFlagsFromString("--expose_gc");
  const collect: () => void = runInNewContext("gc");
  const wave = async () => {
    await Promise.all(Array.from({ length: 250 }, async (_, n) => {
      const socket = await open(port);
      socket.write(wire(message("ping")));
      await once(socket, "data");
      n % 2 === 0 ? socket.destroy() : socket.resetAndDestroy();
    }));
    await nothingOpen();
  };
  const heapAfter = async (waves: number) => {
    for (let n = 0; n < waves; n++) await wave();
    collect();
    return process.memoryUsage().heapUsed;
  };
  const early = await heapAfter(4);
  const late = await heapAfter(12);
  assert.ok(late - early < 3_000_000, `${late - early} bytes more`); // 3,000 connections of 1 KB would be this much
  await assertServing();
});
