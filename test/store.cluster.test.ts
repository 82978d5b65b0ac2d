/** More than one machine: three servers behind one address share nothing but a database. */
import assert from "node:assert/strict";
import { once } from "node:events";
import * as net from "node:net";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import type { Task } from "../tools.ts";
import { noPostgres, startPostgres } from "./support/postgres.ts";
import { freePort, post, spawnServer } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";

/** The one address: each connection goes to the next server that takes it. */
async function startBalancer(t: TestContext, ports: number[]): Promise<number> {
  const sockets = new Set<net.Socket>();
  let turn = 0;
  function pass(client: net.Socket, attemptsLeft: number): void {
    if (attemptsLeft === 0) return void client.destroy();
    const server = net.connect(ports[turn++ % ports.length] ?? 0, "127.0.0.1");
    sockets.add(server);
    server.on("error", () => {}); // "close" follows
    const tryNext = () => pass(client, attemptsLeft - 1);
    server.once("close", tryNext).once("connect", () => {
      server.off("close", tryNext).on("close", () => client.destroy());
      client.on("close", () => server.destroy());
      client.pipe(server).pipe(client);
    });
  }
  const balancer = net.createServer((client) => {
    sockets.add(client.on("error", () => {}));
    pass(client, ports.length);
  }).listen(0, "127.0.0.1");
  await once(balancer, "listening");
  t.after(() => {
    balancer.close();
    for (const socket of sockets) socket.destroy();
  });
  return (balancer.address() as net.AddressInfo).port;
}

const healthOf = async (port: number) => (await fetch(`http://localhost:${port}/health`)).status;

const OWNERS = 3;
const TASKS_EACH = 40;
const CLIENTS = 12;

test("a server killed and a database crashed in the middle of a burst lose no task and double none", {
  skip: noPostgres,
  timeout: 60_000,
}, async (t) => {
  const postgres = await startPostgres();
  t.after(postgres.close);
  const ports = await Promise.all(Array.from({ length: 3 }, freePort));
  const url = `http://localhost:${await startBalancer(t, ports)}/mcp`;
  const tenant = await startTenant(configuredTenant("permissive", url));
  t.after(() => tenant.close());
  const servers = ports.map((port) =>
    spawnServer({
      AUTH0_DOMAIN: tenant.origin,
      MCP_SERVER_URL: url,
      DATABASE_URL: postgres.url,
      PORT: String(port),
    })
  );
  t.after(() => servers.forEach(({ kill }) => kill("SIGKILL")));
  await Promise.all(servers.map(({ ready }) => ready));
  const tokens = await Promise.all(
    Array.from({ length: OWNERS }, (_, owner) => tenant.sign({ sub: `auth0|${owner}` })),
  );

  /** What the tool gives, or undefined where the call failed in whatever way. */
  async function call(token: string, name: string, input: object) {
    try {
      const reply = await post(url, token, "tools/call", { name, arguments: input });
      const { result } = await reply.json();
      return result.isError ? undefined : result.structuredContent;
    } catch {
      return undefined;
    }
  }

  // Each task is asked for twice, by different clients, as by one who has lost the first reply.
  const wanted = tokens.flatMap((token) =>
    Array.from({ length: TASKS_EACH * 2 }, (_, index) => ({ token, title: `${index >> 1}` }))
  );
  const acknowledged: { token: string; task: Task }[] = [];
  const asked = wanted.length;
  let failures = 0;
  let outage = Promise.resolve();

  async function crash() {
    await postgres.kill();
    assert.deepEqual(await Promise.all(ports.slice(1).map(healthOf)), [503, 503]);
    await postgres.start();
  }

  async function work() {
    for (let next = wanted.shift(); next !== undefined; next = wanted.shift()) {
      const { token, title } = next;
      const created = await call(token, "create_task", { title, idempotency_key: title });
      if (created === undefined) {
        failures++;
        wanted.unshift(next);
        await delay(20); // a client's own pause before it tries again
        continue;
      }
      acknowledged.push({ token, task: created.task });
      if (acknowledged.length === asked >> 2) servers[0]?.kill("SIGKILL");
      if (acknowledged.length === asked >> 1) outage = crash();
    }
  }
  await Promise.all(Array.from({ length: CLIENTS }, work));
  await outage;
  assert.equal(await servers[0]?.exited, "SIGKILL");
  assert.ok(failures > 0, "nothing failed: the faults came too late");
  assert.deepEqual(await Promise.all(ports.slice(1).map(healthOf)), [200, 200]);

  for (const token of tokens) {
    const own = acknowledged.filter((one) => one.token === token).map(({ task }) => task);
    const { tasks }: { tasks: Task[] } = await call(token, "list_tasks", { limit: 100 });
    assert.equal(tasks.length, TASKS_EACH);
    // Both replies for a title named the same task, and it is there.
    assert.deepEqual(new Set(own.map(({ id }) => id)), new Set(tasks.map(({ id }) => id)));
    assert.deepEqual(new Set(own.map(({ title }) => title)), new Set(tasks.map(({ title }) => title)));
  }
  for (const { kill, exited } of servers.slice(1)) {
    kill("SIGTERM");
    assert.equal(await exited, 0);
  }
});
