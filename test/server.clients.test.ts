/** Clients that are slow, or disconnect in the middle of a request: nothing is left open, and others are served. */
import assert from "node:assert/strict";
import { once } from "node:events";
import type { ServerResponse } from "node:http";
import { after, afterEach, beforeEach, test } from "node:test";
import { promisify } from "node:util";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { Connection, logOf, message, post, rawPost, type RunningServer, startServer, until } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
let server: RunningServer;
let token: string;

after(() => tenant.close());

beforeEach(async () => {
  server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  token = await tenant.sign({ aud: server.url });
});

afterEach(() => server.close());

async function assertServing() {
  const reply = await post(server.url, token, "ping");
  assert.equal(reply.status, 200);
  await reply.text();
}

/** A request whose body is incomplete. */
const unended = () => rawPost(token, "{", { extra: ["content-length: 1000"] });

const openConnections = ({ http }: RunningServer) => promisify(http.getConnections.bind(http))();

const nothingOpen = (of = server) => until(async () => await openConnections(of) === 0, "nothing is open");

/** A store's `list` that waits for `resume`. */
function pausedList() {
  const { promise: called, resolve: notify } = deferred();
  const { promise: resumed, resolve: resume } = deferred();
  const list = async () => {
    notify();
    await resumed;
    return [];
  };
  return { called, resume, list };
}

function deferred() {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => resolve = settle);
  return { promise, resolve };
}

test("headers may take 10 s, a body 30 s, and an idle connection is kept for over 600 s", async (t) => {
  const { headersTimeout, requestTimeout } = server.http;
  assert.deepEqual([headersTimeout, requestTimeout], [10_000, 30_000]);
  assert.ok(server.http.timeout > 0, "a client that reads no reply");
  const connection = new Connection(server.port);
  t.after(() => connection.close());
  const { head } = await connection.send(rawPost(token, message("ping")));
  assert.ok(Number(/^keep-alive: timeout=(\d+)$/im.exec(head)?.[1]) > 600, head);
});

test("a client that never ends its headers or its body is disconnected soon after the time-out", async () => {
  Object.assign(server.http, { headersTimeout: 1, requestTimeout: 1 }); // milliseconds instead of seconds
  let cutOff = 0;
  for (const request of ["POST /mcp HTTP/1.1\r\nhost: localhost\r\nx-slow: ", unended()]) {
    const connection = new Connection(server.port);
    connection.socket.write(request);
    void once(connection.socket, "data").then(([reply]) => String(reply).startsWith("HTTP/1.1 408 ") && cutOff++);
  }
  await until(() => cutOff === 2, "both are cut off"); // Node looks every 30 s by default
});

test("a client that half-closes its connection leaves nothing open", async () => {
  new Connection(server.port).socket.end(unended());
  await once(server.http, "connection");
  await nothingOpen();
  await assertServing();
});

test("a client that disconnects in the middle of its body leaves nothing open", async () => {
  for (const leave of ["destroy", "resetAndDestroy"] as const) {
    const { socket } = new Connection(server.port);
    socket.write(unended());
    await once(server.http, "connection");
    socket[leave]();
    await nothingOpen();
  }
  await assertServing();
});

for (const part of ["half", "all"]) {
  test(`a disconnect after ${part} of the body while keys are fetched leaves nothing open and is logged`, async (t) => {
    const keySet = await (await fetch(`${tenant.issuer}.well-known/jwks.json`)).text();
    const asked = new Promise<ServerResponse>((resolve) => tenant.answerJwks = resolve);
    t.after(() => tenant.answerJwks = undefined);
    const log = logOf(t);
    const cold = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "debug" }); // knows no key yet
    t.after(cold.close);
    token = await tenant.sign({ aud: cold.url });

    const body = message("ping");
    const { socket } = new Connection(cold.port);
    socket.write(rawPost(token, body).slice(0, part === "half" ? -10 : undefined));
    const response = await asked;
    socket.resetAndDestroy();
    await nothingOpen(cold);
    response.end(keySet);

    await until(() => log.length > 0, "a line in the log");
    assert.match(log.join(""), /^\S+ POST \/mcp .*gone.*\n$/);
  });
}

test("a tool call whose client has disconnected is aborted and logged, and other calls are answered", async (t) => {
  const { called, resume, list } = pausedList();
  const log = logOf(t);
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "debug" });
  t.after(server.close);
  t.mock.method(server.store, "list", list);
  token = await tenant.sign({ aud: server.url });
  // The signal that the SDK gives to a tool. fetch uses the same class.
  const { mock } = t.mock.method(AbortController.prototype, "abort");
  const isSdk = ({ stack }: { stack: Error }) => stack.stack?.includes("@modelcontextprotocol/sdk");
  const { socket } = new Connection(server.port);
  socket.write(rawPost(token, message("tools/call", { name: "list_tasks" })));
  await called;
  socket.resetAndDestroy();
  await until(() => mock.calls.some(isSdk), "the SDK aborts the call");
  await nothingOpen(server);
  assert.match(log.join(""), /^\S+ POST \/mcp tools\/call list_tasks the client has gone .* auth0\|alice \{.*\n$/);
  resume(); // the tool ends, and there is nobody to answer
  assert.equal((await post(server.url, token, "ping")).status, 200);
});

test("a slow tool call does not delay others", async (t) => {
  const { called, resume, list } = pausedList();
  t.mock.method(server.store, "list", list);
  const slow = post(server.url, token, "tools/call", { name: "list_tasks" });
  await called;
  await assertServing();
  resume();
  assert.equal((await slow).status, 200);
});

test("thousands of connections, opened and dropped, leak no memory", async () => {
  setFlagsFromString("--expose_gc");
  const collect: () => void = runInNewContext("gc");
  const wave = async () => {
    await Promise.all(Array.from({ length: 250 }, async (_, n) => {
      const connection = new Connection(server.port);
      await connection.send(rawPost(token, message("ping")));
      await connection.leave(Buffer.from(unended()), n % 2 === 0 ? "end" : "reset");
    }));
    await nothingOpen();
  };
  const heapAfter = async (waves: number) => {
    for (let n = 0; n < waves; n++) await wave();
    collect();
    return process.memoryUsage().heapUsed;
  };
  const early = await heapAfter(4);
  const late = await heapAfter(8);
  assert.ok(late - early < 2_000_000, `${late - early} bytes more`); // 2,000 connections of 1 KB would be this much
  await assertServing();
});
