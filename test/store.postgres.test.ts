/** What a store on PostgreSQL promises beyond other stores: URLs, faults of the network, poolers, several servers. */
import assert from "node:assert/strict";
import { once } from "node:events";
import * as net from "node:net";
import { after, before, describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import pg from "pg";
import { databaseUrlSchema, newTask, openTaskStore, type Task, type TaskStore } from "../tools.ts";
import { noPgBouncer, noPostgres, type Postgres, startPgBouncer, startPostgres } from "./support/postgres.ts";
import { freePort } from "./support/server.ts";

/** The most that a pool opens. */
const CONNECTIONS = 10;
/** In milliseconds: two time-outs of a call, 8 seconds, and what a busy machine adds. TCP would take 15 minutes. */
const BOUNDED = 20_000;
/** In milliseconds: how long a client waits before it tries again. */
const PAUSE = 100;

let postgres: Postgres;
/** A database that a store has used before. */
let url: string;

before(async () => {
  if (noPostgres !== false) return;
  postgres = await startPostgres();
  url = postgres.url;
  await (await openTaskStore(url, () => {})).close();
});

/** Closes what tests have started and opened. Inside `describe`, Deno 2 does not run `t.after`. */
const closing: (() => unknown)[] = [];

after(async () => {
  for (const close of closing.toReversed()) await close();
  await postgres?.close();
});

const updated_at = new Date().toISOString();
const task = (title: string): Task => newTask({ title, notes: null, due_at: null });

async function open(url: string): Promise<TaskStore> {
  const store = await openTaskStore(url, assert.fail);
  closing.push(() => store.close());
  return store;
}

const titles = async (store: TaskStore, owner: string) =>
  (await store.list(owner, { limit: 1_000 })).map(({ title }) => title);

/** Names a store's connections, to tell them from others. */
const named = (url: string, name: string) => `${url}?application_name=${name}`;

/** A column of pg_stat_activity, for each connection of this name. */
const connections = (column: string, name: string) =>
  postgres.query(`SELECT ${column} AS value FROM pg_stat_activity WHERE application_name = '${name}'`)
    .then((rows) => rows.map(({ value }) => value));
const activity = (name: string) => connections("state", name);
const endConnections = (name: string) => connections("pg_terminate_backend(pid, 5000)", name);

/** Makes calls at once. Gives the error of each, or "answered". */
async function outcomes(count: number, call: () => Promise<unknown>): Promise<string[]> {
  const settled = await Promise.allSettled(Array.from({ length: count }, call));
  return settled.map((one) => one.status === "rejected" ? `${one.reason}` : "answered");
}

/** Holds the locks that a statement takes. Gives what releases them. */
async function lock(url: string, statement: string): Promise<() => Promise<void>> {
  const client = new pg.Client(url);
  await client.connect();
  const unlock = () => client.end();
  closing.push(unlock);
  await client.query(`BEGIN; ${statement}`);
  return unlock;
}

const lockTask = (id: string | undefined) => lock(url, `SELECT FROM tasks WHERE id = '${id}' FOR UPDATE`);

/** A proxy between a store and the database, which fails as a network can. */
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
  test("servers that start together on an empty PostgreSQL database all open it", async () => {
    const empty = await postgres.newDatabase();
    // Lets all of them wait at the same place, since on a busy machine they would come one by one.
    const unlock = await lock(empty, "CREATE TABLE schema_changes ()");
    const starts = Array.from({ length: 8 }, () => openTaskStore(named(empty, "start"), () => {}));
    while ((await connections("wait_event_type", "start")).filter((type) => type === "Lock").length < starts.length);
    await unlock();
    for (const store of await Promise.all(starts)) await store.close();
  });

  test("the URLs that providers hand out are accepted, and connections encrypted as their sslmode says", async () => {
    const forms = {
      "sslmode=disable": false,
      "sslmode=require": true,
      "sslmode=require&channel_binding=require": true,
      "schema=public": false,
      "sslmode=require&schema=public&connection_limit=5": true,
    };
    for (const [index, [form, isEncrypted]] of Object.entries(forms).entries()) {
      await open(`${url}?${form}&application_name=form${index}`);
      const ssl = "(SELECT ssl FROM pg_stat_ssl WHERE pg_stat_ssl.pid = pg_stat_activity.pid)";
      assert.deepEqual(new Set(await connections(ssl, `form${index}`)), new Set([isEncrypted]), form);
    }
    await assert.rejects(open(`${url}?sslmode=verify-full`), /^Error: DATABASE_URL: .*self-signed certificate/);
  });

  test("a PostgreSQL that cannot be used stops the start with one line, which does not show the password", async () => {
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
    for (const [at, cause] of Object.entries(causes)) {
      await assert.rejects(open(at), ({ message }: Error) => {
        assert.match(message, /^DATABASE_URL: PostgreSQL cannot be used: /);
        assert.match(message, cause);
        return !/hunter2|\n/.test(message);
      });
    }
  });

  test("a URL that cannot be parsed is refused before a driver quotes its password", () => {
    assert.equal(databaseUrlSchema.safeParse("postgres://tasks:hunter2#@127.0.0.1/tasks").success, false);
    assert.equal(databaseUrlSchema.safeParse("postgres://tasks:hunter2%23@127.0.0.1/tasks").success, true);
  });

  test("a read-only database stops the start, whether it is empty or has tables", async () => {
    const database = await postgres.newDatabase();
    const { pathname } = new URL(database);
    const setReadOnly = (value: string) =>
      postgres.query(`ALTER DATABASE ${pathname.slice(1)} SET default_transaction_read_only = ${value}`);
    await setReadOnly("on");
    await assert.rejects(open(database), /^Error: DATABASE_URL: .*read-only/);
    await setReadOnly("off");
    await open(database);
    await setReadOnly("on");
    await assert.rejects(open(database), /^Error: DATABASE_URL: .*read-only/);
  });

  test("no call fails because idle connections were lost", async () => {
    const store = await open(named(url, "idle"));
    await outcomes(CONNECTIONS, store.check);
    assert.ok((await activity("idle")).length > 1);
    await endConnections("idle");
    assert.deepEqual(new Set(await outcomes(CONNECTIONS, store.check)), new Set(["answered"]));
  });

  test("a connection that is lost in the middle of a call fails that call and no other", async () => {
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

  test("calls that wait for a lock time out, and do not delay others", async () => {
    const store = await open(url);
    const created = await store.create("locked", task("kept"));
    const unlock = await lockTask(created?.id);
    const change = () => store.update("locked", created?.id ?? "", { title: "changed", updated_at });
    for (const outcome of await outcomes(CONNECTIONS, change)) assert.match(outcome, /timeout/);
    assert.deepEqual(await titles(store, "locked"), ["kept"]);
    await unlock();
    assert.equal((await change())?.title, "changed");
  });

  test("calls fail at once while PostgreSQL is down, and the first one after that is answered", async () => {
    const proxy = await startProxy();
    const store = await open(proxy.url);
    await store.create("outage", task("kept"));
    proxy.close();
    for (let round = 0; round < 3; round++) {
      // Any other reason, such as a time-out, would mean that calls queue up while there is no database.
      for (const outcome of await outcomes(40, () => titles(store, "outage"))) {
        assert.match(outcome, /ECONNREFUSED|ECONNRESET|Connection terminated/);
      }
      await assert.rejects(store.check());
    }
    proxy.listen();
    assert.deepEqual(await titles(store, "outage"), ["kept"]);
  });

  test("calls and close end within seconds on a network that delivers nothing", { timeout: BOUNDED }, async () => {
    const proxy = await startProxy();
    const store = await openTaskStore(proxy.url, assert.fail);
    await outcomes(CONNECTIONS, store.check); // now every connection of the pool is open
    proxy.passes = () => false;
    for (const outcome of await outcomes(CONNECTIONS, store.check)) assert.match(outcome, /timeout/);
    proxy.passes = () => true;
    await store.check();
    proxy.passes = () => false;
    await store.close();
  });

  test("a task whose acknowledgement was lost is stored, and its idempotency key returns it", async () => {
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

describe("a store behind a pooler", { skip: noPgBouncer, timeout: 60_000 }, () => {
  test("the first call after a restart of the pooler is answered", async () => {
    const pooler = await startPgBouncer(url);
    const store = await open(pooler.url);
    await pooler.close();
    await assert.rejects(store.check());
    const another = await startPgBouncer(url, Number(new URL(pooler.url).port));
    closing.push(another.close);
    await store.check();
  });

  test("users who outnumber the pooler's connections get only their own tasks", async () => {
    const pooler = await startPgBouncer(url);
    closing.push(pooler.close);
    const [store, other] = [await open(pooler.url), await open(pooler.url)];
    await listDuring(store, async () => {
      for (let count = 0; count < 30; count++) await other.create("busy", task(`${count}`));
    });
  });
});

describe("a store on PostgreSQL with forty users", { skip: noPostgres, timeout: 60_000 }, () => {
  test("every user gets their own tasks while the type of a column is changed", async () => {
    await listDuring(await open(url), async () => {
      for (const type of ["VARCHAR(40)", "TEXT", "VARCHAR(50)", "TEXT", "VARCHAR(60)", "TEXT"]) {
        await postgres.query(`ALTER TABLE tasks ALTER due_at TYPE ${type}`);
      }
    });
  });

  test("restarts of the database leave the store no connections beyond its limit", async () => {
    const store = await openTaskStore(named(url, "restarted"), () => {});
    await listDuring(store, async () => {
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

/**
 * Forty users list their one task again and again while an action runs.
 *
 * @throws {AssertionError} When one of them was given another's task, or none. A call that fails is no wrong answer.
 */
async function listDuring(store: TaskStore, action: () => Promise<unknown>): Promise<void> {
  const owners = Array.from({ length: 40 }, (_, index) => `owner ${index}`);
  for (const owner of owners) await store.create(owner, task(owner), owner);
  const wrong: string[] = [];
  let answers = 0;
  let isRunning = true;
  const users = owners.map(async (owner) => {
    while (isRunning) {
      const given = await titles(store, owner).catch(() => delay(PAUSE));
      if (given === undefined) continue;
      answers++;
      if (given.join() !== owner) wrong.push(`${owner} was given '${given}'`);
    }
  });
  await action().finally(() => isRunning = false);
  await Promise.all(users);
  assert.deepEqual(wrong, []);
  assert.ok(answers > 40, `only ${answers} answers`);
}
