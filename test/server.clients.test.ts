/** Clients at fault: others go on being served, and nothing is left open. Raw sockets, since no client library errs so. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { connect } from "node:net";
import type { Socket } from "node:net";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { startServer } from "./support/server.ts";
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
  server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  port = Number(new URL(server.url).port);
  token = await tenant.sign({ aud: server.url });
});

afterEach(() => server.close());

/** Others go on being served, which each test ends with. */
async function assertServing() {
  const reply = await fetch(server.url, { method: "POST", headers: headers(), body: message("ping") });
  assert.equal(reply.status, 200);
  await reply.text();
}

const headers = () => ({
  authorization: `Bearer ${token}`,
  accept: "application/json, text/event-stream",
  "content-type": "application/json",
});

const message = (method: string, params = {}, id = 1) =>
  JSON.stringify({ jsonrpc: "2.0", id, method, params });

/** A request as it goes over the wire. */
function wire(body: string, extra: string[] = [`content-length: ${Buffer.byteLength(body)}`]): string {
  const lines = Object.entries(headers()).map((pair) => pair.join(": "));
  return ["POST /mcp HTTP/1.1", "host: localhost", ...lines, ...extra, "", body].join("\r\n");
}

/** The last request of its connection. */
const last = (body: string, extra: string[] = []) =>
  wire(body, [...extra, `content-length: ${body.length}`, "connection: close"]);

async function open(): Promise<Socket> {
  const socket = connect(port, "127.0.0.1");
  socket.on("error", () => {}); // being cut off is what these tests are about
  await once(socket, "connect");
  return socket;
}

/** All that comes back until the server ends the connection. */
async function readAll(socket: Socket): Promise<string> {
  let text = "";
  socket.on("data", (chunk: Buffer) => text += chunk.toString());
  await once(socket, "close");
  return text;
}

const openConnections = () =>
  new Promise<number>((resolve, reject) =>
    server.http.getConnections((error, count) => error ? reject(error) : resolve(count))
  );

/** Waits for what the server does on its own, and fails if it never does. */
async function until(isSo: () => Promise<boolean>) {
  while (!await isSo()) await new Promise((resolve) => setImmediate(resolve));
}

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
  Object.assign(server.http, { headersTimeout: 100, requestTimeout: 200 }); // shorter, or the test would take long
  const slowHeaders = await open();
  slowHeaders.write("POST /mcp HTTP/1.1\r\nhost: localhost\r\nx-slow: ");
  const slowBody = await open();
  slowBody.write(wire("{", ["content-length: 1000"]));
  const answers = [readAll(slowHeaders), readAll(slowBody)];
  await assertServing();
  for (const answer of await Promise.all(answers)) assert.match(answer, /^HTTP\/1.1 408 /);
});

test("a client that closes its half of the connection leaves nothing open", async () => {
  const socket = await open();
  socket.end(wire("{", ["content-length: 1000"]));
  await until(async () => await openConnections() === 0);
  await assertServing();
});

test("a client that goes in the middle of its body leaves nothing open", async () => {
  for (const leave of ["destroy", "resetAndDestroy"] as const) {
    const socket = await open();
    socket.write(wire("{", ["content-length: 1000"]));
    await until(async () => await openConnections() === 1);
    socket[leave]();
    await until(async () => await openConnections() === 0);
  }
  await assertServing();
});

test("a client that goes in the middle of a tool call leaves nothing open, and harms nobody", async (t) => {
  const { asked, goOn, list } = waitingList();
  t.mock.method(server.store, "list", list);
  const socket = await open();
  socket.write(wire(listTasks));
  await asked;
  socket.resetAndDestroy();
  await until(async () => await openConnections() === 0);
  goOn(); // the tool ends, and there is nobody to answer
  await assertServing();
});

test("a slow tool call keeps nobody else waiting", async (t) => {
  const { asked, goOn, list } = waitingList();
  t.mock.method(server.store, "list", list);
  const slow = fetch(server.url, { method: "POST", headers: headers(), body: listTasks });
  await asked;
  await assertServing();
  goOn();
  assert.equal((await slow).status, 200);
});

test("pipelined requests are answered each, and in their order", async () => {
  const socket = await open();
  const requests = [1, 2, 3].map((id) => wire(message("ping", {}, id)));
  socket.write(requests.join("") + last(listTasks));
  const answer = await readAll(socket);
  const ids = [...answer.matchAll(/"id":(\d)/g)].map(([, id]) => id);
  assert.deepEqual(ids, ["1", "2", "3", "1"]);
});

test("conflicting headers are refused", async () => {
  const body = message("ping");
  const length = `content-length: ${body.length}`;
  for (
    const extra of [[length, "content-length: 1"], [length, "transfer-encoding: chunked"], [
      "content-length: -1",
    ]]
  ) {
    const socket = await open();
    socket.write(wire(body, extra));
    assert.match(await readAll(socket), /^HTTP\/1.1 400 /, extra.join());
  }
  await assertServing();
});

test("of two tokens in one request the first counts alone", async () => {
  const second = `authorization: Bearer ${await tenant.sign({ aud: server.url, sub: "auth0|bob" })}`;
  const socket = await open();
  socket.write(last(message("tools/call", { name: "get_profile" }), [second]));
  assert.match(await readAll(socket), /"id":"auth0\|alice"/);
});

test("headers over 16 KiB are refused", async () => {
  const socket = await open();
  socket.write(wire("", [`x-padding: ${"x".repeat(17_000)}`, "content-length: 0"]));
  assert.match(await readAll(socket), /^HTTP\/1.1 431 /);
  await assertServing();
});

test("a batch that cancels its own request is answered", async () => {
  const cancel = { jsonrpc: "2.0", method: "notifications/cancelled", params: { requestId: 1 } };
  const body = `[${listTasks},${JSON.stringify(cancel)}]`;
  const reply = await fetch(server.url, { method: "POST", headers: headers(), body });
  assert.equal((await reply.json()).id, 1);
});

test("ten thousand connections, opened and dropped, leave no memory behind", async () => {
  setFlagsFromString("--expose_gc");
  const collect: () => void = runInNewContext("gc");
  const wave = async () => {
    const sockets = await Promise.all(Array.from({ length: 250 }, async (_, n) => {
      const socket = await open();
      socket.write(wire(message("ping")));
      await once(socket, "data");
      n % 2 === 0 ? socket.destroy() : socket.resetAndDestroy();
      return socket;
    }));
    assert.equal(sockets.length, 250);
    await until(async () => await openConnections() === 0);
  };
  const heapAfter = async (waves: number) => {
    for (let n = 0; n < waves; n++) await wave();
    collect();
    return process.memoryUsage().heapUsed;
  };
  const early = await heapAfter(10);
  const late = await heapAfter(30);
  assert.ok(late - early < 10_000_000, `${late - early} bytes more`); // 7,500 connections of 1.4 KB would be this much
  await assertServing();
});
