/** What a store on PostgreSQL owes beyond the contract of every store: as to its driver, the network, poolers, servers. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { cp, mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import * as net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import pg from "pg";
import { readSettings } from "../server.ts";
import { newTask, openTaskStore } from "../tools.ts";
import type { Task, TaskStore } from "../tools.ts";
import { noPgBouncer, noPostgres, startPgBouncer, startPostgres } from "./support/postgres.ts";
import type { Postgres } from "./support/postgres.ts";
import { freePort, post, spawnServer } from "./support/server.ts";
import { configuredTenant, startTenant } from "./support/tenant.ts";

const ROOT = join(import.meta.dirname, "..");
/** What a pool may open. */
const CONNECTIONS = 10;
/** In milliseconds: two time-outs of a call, 8 seconds, and what a busy machine adds. TCP alone would take 15 minutes. */
const BOUNDED = 20_000;

/** In milliseconds: a client's own, before it tries again what has failed. */
const PAUSE = 100;

let postgres: Postgres;
/** A database that stores have used before. */
let url: string;

before(async () => {
  if (noPostgres !== false) return;
  postgres = await startPostgres();
  url = postgres.url;
  await (await openTaskStore(url, () => {})).close();
});

/** What tests have opened. Inside `describe`, Deno 2 never calls what `t.after` is given. */
const closing: (() => unknown)[] = [];

after(async () => {
  for (const close of closing.toReversed()) await close();
  await postgres?.close();
});

const updated_at = new Date().toISOString();
const task = (title: string) => newTask({ title, notes: null, due_at: null });

async function open(url: string, warn: (line: string) => void = () => {}): Promise<TaskStore> {
  const store = await openTaskStore(url, warn);
  closing.push(() => store.close());
  return store;
}

const titles = async (store: TaskStore, owner: string) =>
  (await store.list(owner, { limit: 1_000 })).map(({ title }) => title);

/** Tells a store's connections from those of others. */
const named = (url: string, name: string) => `${url}?application_name=${name}`;

/** What each of a store's connections is doing, as the database sees it. */
async function activity(name: string): Promise<unknown[]> {
  const rows = await postgres.query(`SELECT state FROM pg_stat_activity WHERE application_name = '${name}'`);
  return rows.map(({ state }) => state);
}

function endConnections(name: string): Promise<unknown> {
  return postgres.query(
    `SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = '${name}'`,
  );
}

/** Holds the locks that a statement takes, until what this returns is called or the test ends. */
async function lock(url: string, statement: string): Promise<() => Promise<void>> {
  const client = new pg.Client(url);
  await client.connect();
  const unlock = () => client.end();
  closing.push(unlock);
  await client.query(`BEGIN; ${statement}`);
  return unlock;
}

const lockTask = (id: string | undefined) => lock(url, `SELECT FROM tasks WHERE id = '${id}' FOR UPDATE`);

/** Stands between a store and the database, to be what a network can be. */
async function startProxy() {
  const sockets = new Set<net.Socket>();
  const server = net.createServer((client) => {
    const database = net.connect(Number(new URL(url).port), "127.0.0.1");
    for (const [from, to] of [[client, database], [database, client]] as const) {
      sockets.add(from);
      from.on("data", (data) => proxy.passes(`${data}`, from === database) && to.write(data));
      from.on("close", () => proxy.passes("", from === database) && to.destroy());
      from.on("error", () => {});
    }
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as net.AddressInfo;
  const proxy = {
    url: url.replace(/:\d+\//, `:${port}/`),
    /** Whether data, or with "" the end of the connection, gets through to the other side. */
    passes: (_data: string, _isFromDatabase: boolean) => true,
    listen: () => server.listen(port, "127.0.0.1"),
    close() {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
  closing.push(proxy.close);
  return proxy;
}

describe("a store on PostgreSQL", { skip: noPostgres, concurrency: true, timeout: 60_000 }, () => {
  test("is opened by servers that start at once on an empty database", async () => {
    const empty = await postgres.newDatabase();
    // Holds all of them up at the same place, since on a busy machine they would come one by one.
    const unlock = await lock(empty, "CREATE TABLE schema_changes ()");
    const starts = Array.from({ length: 8 }, () => openTaskStore(named(empty, "start"), () => {}));
    const waiting = "SELECT FROM pg_stat_activity WHERE application_name = 'start' AND wait_event_type = 'Lock'";
    while ((await postgres.query(waiting)).length < starts.length);
    await unlock();
    for (const store of await Promise.all(starts)) await store.close();
  });

  test("is opened with the URLs that providers hand out, and encrypted as their sslmode says", async () => {
    const forms = {
      "sslmode=disable": false,
      "sslmode=require": true,
      "sslmode=require&channel_binding=require": true,
      "schema=public": false,
      "sslmode=require&schema=public&connection_limit=5": true,
    };
    await Promise.all(
      Object.entries(forms).map(async ([form, isEncrypted], index) => {
        const name = `form${index}`;
        await open(`${url}?${form}&application_name=${name}`, assert.fail);
        const connections = await postgres.query(
          `SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = '${name}'`,
        );
        assert.deepEqual(new Set(connections.map(({ ssl }) => ssl)), new Set([isEncrypted]), form);
      }),
    );
    await assert.rejects(
      open(`${url}?sslmode=verify-full`),
      /^Error: DATABASE_URL: .*self-signed certificate/,
    );
  });

  test("that cannot be had is one line at the start, without its password", async () => {
    const silent = net.createServer(() => {}).listen(0, "127.0.0.1");
    await once(silent, "listening");
    closing.push(() => silent.close());
    const address = (port: number) => `postgres://tasks:hunter2@127.0.0.1:${port}/tasks`;
    const causes = {
      [address(await freePort())]: /ECONNREFUSED/,
      [address((silent.address() as net.AddressInfo).port)]: /timeout/,
      [url.replace(/:[^:]+@/, ":hunter2@")]: /password authentication failed/,
      [new URL("/missing", url).href]: /database "missing" does not exist/,
    };
    await Promise.all(
      Object.entries(causes).map(([at, cause]) =>
        assert.rejects(open(at), ({ message }: Error) => {
          assert.match(message, /^DATABASE_URL: PostgreSQL cannot be used: /);
          assert.match(message, cause);
          return !/hunter2|\n/.test(message);
        })
      ),
    );
  });

  test("whose URL is none, as with a raw # in the password, is one line without the password", () => {
    const env = {
      AUTH0_DOMAIN: "tenant.example.auth0.com",
      MCP_SERVER_URL: "https://mcp.example.com/mcp",
      DATABASE_URL: "postgres://tasks:hunter2#@127.0.0.1/tasks",
    };
    assert.throws(() => readSettings(env), ({ message }: Error) => {
      assert.match(message, /^DATABASE_URL is no such URL: .*%23/);
      return !/hunter2|\n/.test(message);
    });
  });

  test("whose driver is not installed is one line that says how to install it", async () => {
    const project = await mkdtemp(join(tmpdir(), "no-driver-"));
    closing.push(() => rm(project, { recursive: true }));
    await mkdir(join(project, "node_modules"));
    for (const name of ["@modelcontextprotocol", "jose", "zod"]) {
      await symlink(join(ROOT, "node_modules", name), join(project, "node_modules", name));
    }
    for (const name of ["tools.ts", "auth.ts", "package.json"]) {
      await cp(join(ROOT, name), join(project, name));
    }
    const { openTaskStore }: typeof import("../tools.ts") = await import(pathToFileURL(join(project, "tools.ts")).href);
    await assert.rejects(
      openTaskStore(url, () => {}),
      /^Error: DATABASE_URL: .*its driver is missing, run: npm install --save-prod pg$/,
    );
  });

  test("that can only be read stops the start, whether it is new or has been used", async () => {
    const database = await postgres.newDatabase();
    const setReadOnly = (value: string) =>
      postgres.query(
        `ALTER DATABASE ${new URL(database).pathname.slice(1)} SET default_transaction_read_only = ${value}`,
      );
    await setReadOnly("on");
    await assert.rejects(open(database), /^Error: DATABASE_URL: .*read-only/);
    await setReadOnly("off");
    await open(database);
    await setReadOnly("on");
    await assert.rejects(open(database), /^Error: DATABASE_URL: .*read-only/);
  });

  test("loses idle connections, and no call by it", async () => {
    const store = await open(named(url, "idle"));
    const callOften = () => Promise.all(Array.from({ length: CONNECTIONS }, () => store.check()));
    await callOften();
    assert.ok((await activity("idle")).length > 1);
    await endConnections("idle");
    await callOften();
  });

  test("loses a connection in the middle of a call, and no other call by it", async () => {
    const store = await open(named(url, "middle"));
    const created = await store.create("middle", task("kept"));
    const unlock = await lockTask(created?.id);
    const lost = assert.rejects(store.update("middle", created?.id ?? "", { title: "lost", updated_at }), /terminat/);
    while (!(await activity("middle")).includes("active"));
    await endConnections("middle");
    await lost;
    assert.deepEqual(await titles(store, "middle"), ["kept"]);
    await unlock();
    await store.update("middle", created?.id ?? "", { title: "changed", updated_at });
  });

  test("gives up calls that wait for a lock, and has the database give them up", async () => {
    const store = await open(named(url, "locked"));
    const created = await store.create("locked", task("kept"));
    const unlock = await lockTask(created?.id);
    const change = () => store.update("locked", created?.id ?? "", { title: "changed", updated_at });
    const calls = await Promise.allSettled(Array.from({ length: CONNECTIONS }, change));
    for (const call of calls) assert.match(call.status === "rejected" ? `${call.reason}` : "done", /timeout/);
    assert.ok(!(await activity("locked")).includes("active"));
    await unlock();
    assert.equal((await change())?.title, "changed");
  });

  test("answers the first call after an outage, and none waits in the meantime", async () => {
    const proxy = await startProxy();
    const store = await open(proxy.url);
    await store.create("outage", task("kept"));
    proxy.close();
    for (let round = 0; round < 3; round++) {
      const calls = await Promise.allSettled(Array.from({ length: 40 }, () => titles(store, "outage")));
      // Any other reason, such as a time-out, would mean that calls queue up while there is no database.
      for (const call of calls) {
        const outcome = call.status === "rejected" ? `${call.reason}` : "answered";
        assert.match(outcome, /ECONNREFUSED|ECONNRESET|Connection terminated/);
      }
      await assert.rejects(store.check());
    }
    proxy.listen();
    assert.deepEqual(await titles(store, "outage"), ["kept"]);
  });

  test("waits a bounded time for a network that swallows everything", { timeout: BOUNDED }, async () => {
    const proxy = await startProxy();
    const store = await open(proxy.url);
    const callOften = () => Promise.allSettled(Array.from({ length: CONNECTIONS }, () => store.check()));
    await callOften(); // now every connection of the pool is open
    proxy.passes = () => false;
    for (const call of await callOften()) {
      assert.match(call.status === "rejected" ? `${call.reason}` : "answered", /timeout/);
    }
    proxy.passes = () => true;
    await store.check();
  });

  test("is closed although its network swallows everything", { timeout: BOUNDED }, async () => {
    const proxy = await startProxy();
    const store = await openTaskStore(proxy.url, () => {});
    proxy.passes = () => false;
    await store.close();
  });

  test("has the task whose acknowledgement was lost, and its key gives it back", async () => {
    const proxy = await startProxy();
    const [cutOff, other] = [await open(proxy.url), await open(url)];
    const owner = "cut off";
    let isSent = false;
    const answered = new Promise<void>((resolve) => {
      proxy.passes = (data, isFromDatabase) => {
        if (isSent && isFromDatabase) resolve();
        isSent ||= data.includes(owner);
        return !isSent || !isFromDatabase;
      };
    });
    const lost = assert.rejects(cutOff.create(owner, task("first"), "key"));
    await answered;
    assert.equal((await other.create(owner, task("second"), "key"))?.title, "first");
    assert.deepEqual(await titles(other, owner), ["first"]);
    proxy.close();
    await lost;
  });
});

describe("a store on PostgreSQL through a pooler", { skip: noPgBouncer, timeout: 60_000 }, () => {
  test("that takes no statement_timeout works, and says what to set in the database", async () => {
    const pooler = await startPgBouncer(url);
    closing.push(pooler.close);
    const lines: string[] = [];
    const store = await open(pooler.url, (line) => lines.push(line));
    await store.create("pooled", task("kept"));
    assert.deepEqual(await titles(store, "pooled"), ["kept"]);
    assert.equal(lines.length, 1);
    assert.match(lines[0] ?? "", /ALTER ROLE .* SET statement_timeout/);
  });

  test("that is started again answers the next call", async () => {
    const pooler = await startPgBouncer(url);
    const store = await open(pooler.url);
    await pooler.close();
    await assert.rejects(store.check());
    const another = await startPgBouncer(url, Number(new URL(pooler.url).port));
    closing.push(another.close);
    await store.check();
  });

  test("gives each of more callers than connections their own tasks alone", async () => {
    const pooler = await startPgBouncer(url);
    closing.push(pooler.close);
    const [store, other] = [await open(pooler.url), await open(pooler.url)];
    await listMeanwhile(store, async () => {
      for (let count = 0; count < 30; count++) await other.create("busy", task(`${count}`));
    });
  });
});

describe("a store on PostgreSQL that forty users call", { skip: noPostgres, timeout: 60_000 }, () => {
  test("gives each their own tasks alone, and never none, while a column's type is changed", async () => {
    await listMeanwhile(await open(url), async () => {
      for (const type of ["VARCHAR(40)", "TEXT", "VARCHAR(50)", "TEXT", "VARCHAR(60)", "TEXT"]) {
        await postgres.query(`ALTER TABLE tasks ALTER due_at TYPE ${type}`);
      }
    });
  });

  test("leaves a database that is started again and again no connection too many", async () => {
    const store = await openTaskStore(named(url, "restarted"), () => {});
    await listMeanwhile(store, async () => {
      for (let restart = 0; restart < 2; restart++) {
        await postgres.kill();
        await postgres.start();
        while (!await store.check().then(() => true, () => false)) await delay(PAUSE);
      }
    });
    assert.ok((await activity("restarted")).length <= CONNECTIONS);
    await store.close();
    while ((await activity("restarted")).length > 0); // the database takes a moment to see that they are closed
  });
});

test("a server killed and a database crashed in the middle of a burst lose no task and double none", {
  skip: noPostgres,
  timeout: 60_000,
}, async (t) => {
  const ports = await Promise.all(Array.from({ length: 3 }, freePort));
  const url = "https://tasks.example.com/mcp"; // of whatever stands before the three
  const DATABASE_URL = await postgres.newDatabase();
  const tenant = await startTenant(configuredTenant("permissive", url));
  t.after(() => tenant.close());
  const servers = ports.map((port) =>
    spawnServer({ AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: url, DATABASE_URL, PORT: String(port) })
  );
  t.after(() => servers.forEach(({ kill }) => kill("SIGKILL")));
  await Promise.all(servers.map(({ ready }) => ready));
  const tokens = await Promise.all(["one", "two", "three"].map((owner) => tenant.sign({ sub: `auth0|${owner}` })));
  const healthOf = async (port: number) => (await fetch(`http://127.0.0.1:${port}/health`)).status;
  let turn = 0;

  /** What the tool gives, or undefined where the call failed. It goes to the next server that takes the connection. */
  async function call(token: string, name: string, input: object) {
    for (;;) {
      const at = `http://127.0.0.1:${ports[turn++ % ports.length]}/mcp`;
      try {
        const reply = await post(at, token, "tools/call", { name, arguments: input });
        const { result } = await reply.json();
        return result.isError ? undefined : result.structuredContent;
      } catch (error) {
        if (!(error instanceof Error && /ECONNREFUSED/.test(`${error.cause}`))) return undefined;
      }
    }
  }

  const tasksEach = 40;
  // Each task is asked for twice, by different clients, as by one who has lost the first reply.
  const wanted = tokens.flatMap((token) =>
    Array.from({ length: tasksEach * 2 }, (_, index) => ({ token, title: `${index >> 1}` }))
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
        await delay(PAUSE);
        continue;
      }
      acknowledged.push({ token, task: created.task });
      if (acknowledged.length === asked >> 2) servers[0]?.kill("SIGKILL");
      if (acknowledged.length === asked >> 1) outage = crash();
    }
  }
  await Promise.all(Array.from({ length: 12 }, work));
  await outage;
  assert.equal(await servers[0]?.exited, "SIGKILL");
  assert.ok(failures > 0, "nothing failed: the faults came too late");
  assert.deepEqual(await Promise.all(ports.slice(1).map(healthOf)), [200, 200]);

  for (const token of tokens) {
    const own = acknowledged.filter((one) => one.token === token).map(({ task }) => task);
    const { tasks }: { tasks: Task[] } = await call(token, "list_tasks", { limit: 100 });
    assert.equal(tasks.length, tasksEach);
    // Both replies for a title named the same task, and it is there.
    assert.deepEqual(new Set(own.map(({ id }) => id)), new Set(tasks.map(({ id }) => id)));
    assert.deepEqual(new Set(own.map(({ title }) => title)), new Set(tasks.map(({ title }) => title)));
  }
  for (const { kill, exited } of servers.slice(1)) {
    kill("SIGTERM");
    assert.equal(await exited, 0);
  }
});

/**
 * Forty users list their one task again and again while something happens.
 *
 * @throws {AssertionError} When one of them was given another's task, or none: an error alone is no wrong answer.
 */
async function listMeanwhile(store: TaskStore, happening: () => Promise<unknown>): Promise<void> {
  const owners = Array.from({ length: 40 }, (_, index) => `owner ${index}`);
  for (const owner of owners) await store.create(owner, task(owner), owner);
  const wrong: string[] = [];
  let answers = 0;
  let isHappening = true;
  const users = owners.map(async (owner) => {
    while (isHappening) {
      try {
        const found = await titles(store, owner);
        answers++;
        if (found.join() !== owner) wrong.push(`${owner} was given '${found}'`);
      } catch {
        await delay(PAUSE);
      }
    }
  });
  await happening().finally(() => isHappening = false);
  await Promise.all(users);
  assert.deepEqual(wrong, []);
  assert.ok(answers > 40, `only ${answers} answers`);
}
