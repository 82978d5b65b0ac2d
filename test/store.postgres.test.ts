/** What a store on PostgreSQL owes beyond the contract of every store: as to its driver, the network, and poolers. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { cp, mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import * as net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import type { TestContext } from "node:test";
import { pathToFileURL } from "node:url";
import { openTaskStore } from "../tools.ts";
import type { TaskStore } from "../tools.ts";
import { noPgBouncer, noPostgres, query, startPgBouncer, startPostgres } from "./support/postgres.ts";
import type { Postgres } from "./support/postgres.ts";
import { freePort, spawnServer } from "./support/server.ts";

const ROOT = join(import.meta.dirname, "..");
/** What a pool may open. */
const CONNECTIONS = 10;
/** In milliseconds: two time-outs of a call, 8 seconds, and what a busy machine adds. TCP alone would take 15 minutes. */
const BOUNDED = 20_000;

const task = (title: string) => ({ title, notes: null, due_at: null });

async function open(t: TestContext, url: string, warn: (line: string) => void = () => {}): Promise<TaskStore> {
  const store = await openTaskStore(url, warn);
  t.after(() => store.close());
  return store;
}

const titles = async (store: TaskStore, owner: string) =>
  (await store.list(owner, { limit: 1_000 })).map(({ title }) => title);

const named = (url: string, name: string) => `${url}?application_name=${name}`;

/** The statements that the database has open for these connections, "idle" where there is none. */
async function activity(url: string, name: string): Promise<unknown[]> {
  const rows = await query(url, `SELECT state FROM pg_stat_activity WHERE application_name = '${name}'`);
  return rows.map(({ state }) => state);
}

/** Holds a lock that every statement on tasks has to wait for, until the end of the test or of what it returns. */
async function lockTasks(t: TestContext, url: string): Promise<() => Promise<void>> {
  const { default: pg } = await import("pg");
  const client = new pg.Client(url);
  await client.connect();
  const unlock = () => client.end();
  t.after(unlock);
  await client.query("BEGIN; LOCK TABLE tasks");
  return unlock;
}

/** Stands between a store and the database, to be what a network can be. */
async function startProxy(t: TestContext, url: string) {
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
  t.after(proxy.close);
  return proxy;
}

/** Forty users, who list their one task again and again while something happens: what was wrong with the answers. */
async function listMeanwhile(store: TaskStore, happening: () => Promise<unknown>): Promise<string[]> {
  const owners = Array.from({ length: 40 }, (_, index) => `owner ${index}`);
  for (const owner of owners) await store.create(owner, task(owner), owner);
  const wrong: string[] = [];
  let answers = 0;
  let isHappening = true;
  const callers = owners.map(async (owner) => {
    while (isHappening) {
      const found = await titles(store, owner).catch(() => undefined); // an error is no wrong answer
      if (found !== undefined) answers++;
      if (found !== undefined && found.join() !== owner) wrong.push(`${owner} was given '${found}'`);
    }
  });
  await happening().finally(() => isHappening = false);
  await Promise.all(callers);
  assert.ok(answers > 100, `only ${answers} answers`);
  return wrong;
}

describe("PostgreSQL", { skip: noPostgres, concurrency: true, timeout: 60_000 }, () => {
  let postgres: Postgres;
  let url: string;
  let directory: string;

  before(async () => {
    postgres = await startPostgres();
    url = await postgres.newDatabase();
    await (await openTaskStore(url, () => {})).close();
    directory = await mkdtemp(join(tmpdir(), "store-"));
  });

  after(async () => {
    await postgres.close();
    await rm(directory, { recursive: true });
  });

  test("while a column's type is changed nobody is given another's task, and nobody none", async (t) => {
    const changed = await postgres.newDatabase();
    const wrong = await listMeanwhile(await open(t, changed), async () => {
      for (const type of ["VARCHAR(40)", "TEXT", "VARCHAR(50)", "TEXT", "VARCHAR(60)", "TEXT"]) {
        await query(changed, `ALTER TABLE tasks ALTER due_at TYPE ${type}`);
      }
    });
    assert.deepEqual(wrong, []);
  });

  test("servers that start at once on an empty database all make it their own", async () => {
    const empty = await postgres.newDatabase();
    const stores = await Promise.all(Array.from({ length: 24 }, () => openTaskStore(empty, () => {})));
    for (const store of stores) await store.check();
    await Promise.all(stores.map((store) => store.close()));
  });

  test("TLS is as the URL's sslmode says, in the forms that providers hand out", async (t) => {
    const forms = {
      "sslmode=disable": false,
      "sslmode=require": true,
      "sslmode=require&channel_binding=require": true,
      "schema=public": false,
      "sslmode=require&schema=public&connection_limit=5": true,
    };
    await Promise.all(
      Object.entries(forms).map(async ([form, isEncrypted], index) => {
        const lines: string[] = [];
        const store = await open(t, `${url}?${form}&application_name=tls${index}`, (line) => lines.push(line));
        await store.check();
        const connections = await query(
          url,
          `SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'tls${index}'`,
        );
        assert.deepEqual(new Set(connections.map(({ ssl }) => ssl)), new Set([isEncrypted]), form);
        assert.deepEqual(lines, []);
      }),
    );
    await assert.rejects(open(t, `${url}?sslmode=verify-full`), /^Error: DATABASE_URL: .*self-signed certificate/);
  });

  test("a database that cannot be had is one line at the start, without its password", async (t) => {
    const silent = net.createServer(() => {}).listen(0, "127.0.0.1");
    await once(silent, "listening");
    t.after(() => silent.close());
    const address = (port: number) => `postgres://tasks:hunter2@127.0.0.1:${port}/tasks`;
    const causes = {
      [address(await freePort())]: /ECONNREFUSED/,
      [address((silent.address() as net.AddressInfo).port)]: /timeout/,
      [url.replace(/:[^:]+@/, ":hunter2@")]: /password authentication failed/,
      [new URL("/missing", url).href]: /database "missing" does not exist/,
    };
    await Promise.all(
      Object.entries(causes).map(([at, cause]) =>
        assert.rejects(open(t, at), ({ message }: Error) => {
          assert.match(message, /^DATABASE_URL\b/);
          assert.match(message, cause);
          return !/hunter2|\n/.test(message);
        })
      ),
    );
  });

  test("a server told to use a URL that is none says so in one line, without its password", async () => {
    const { lines, exited } = spawnServer({
      AUTH0_DOMAIN: "tenant.example.auth0.com",
      MCP_SERVER_URL: "https://mcp.example.com/mcp",
      DATABASE_URL: "postgres://tasks:hunter2#@127.0.0.1/tasks",
    });
    assert.equal(await exited, 1);
    const [line = "", ...others] = lines;
    assert.match(line, /^DATABASE_URL .*%23/);
    assert.doesNotMatch(line, /hunter2/);
    assert.deepEqual(others, []);
  });

  test("a driver that is not installed is one line that says how to install it", async () => {
    const project = join(directory, "project");
    await mkdir(join(project, "node_modules"), { recursive: true });
    for (const name of ["@modelcontextprotocol", "jose", "zod"]) {
      await symlink(join(ROOT, "node_modules", name), join(project, "node_modules", name));
    }
    for (const name of ["tools.ts", "auth.ts", "package.json"]) await cp(join(ROOT, name), join(project, name));
    const { openTaskStore }: typeof import("../tools.ts") = await import(
      pathToFileURL(join(project, "tools.ts")).href
    );
    await assert.rejects(
      openTaskStore(url, () => {}),
      /^Error: DATABASE_URL: .*its driver is missing, run: npm install --save-prod pg$/,
    );
  });

  test("a database that can only be read stops the start, new or made before", async (t) => {
    const old = await postgres.newDatabase();
    await (await openTaskStore(old, () => {})).close();
    for (const readOnly of [old, await postgres.newDatabase()]) {
      const name = new URL(readOnly).pathname.slice(1);
      await query(postgres.url, `ALTER DATABASE ${name} SET default_transaction_read_only = on`);
      await assert.rejects(open(t, readOnly), /^Error: DATABASE_URL: .*read-only/);
    }
  });

  test("an idle connection that is lost harms no call", async (t) => {
    const store = await open(t, named(url, "idle"));
    const { length } = await Promise.all(Array.from({ length: CONNECTIONS }, () => store.check()));
    assert.equal((await activity(url, "idle")).length, length);
    await query(
      url,
      "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE application_name = 'idle'",
    );
    await Promise.all(Array.from({ length }, () => store.check()));
  });

  test("a connection lost in the middle of a call fails that call alone", async (t) => {
    const own = await postgres.newDatabase();
    const store = await open(t, named(own, "middle"));
    const unlock = await lockTasks(t, own);
    const lost = assert.rejects(store.check(), /terminat/);
    while (!(await activity(own, "middle")).includes("active"));
    await query(own, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'middle'");
    await lost;
    await unlock();
    await store.check();
  });

  test("calls that wait for a lock are given up, in the database too", async (t) => {
    const own = await postgres.newDatabase();
    const store = await open(t, named(own, "locked"));
    const unlock = await lockTasks(t, own);
    const calls = await Promise.allSettled(Array.from({ length: CONNECTIONS }, () => store.check()));
    assert.deepEqual(new Set(calls.map(({ status }) => status)), new Set(["rejected"]));
    while ((await activity(own, "locked")).includes("active"));
    await unlock();
    await store.check();
  });

  test("after an outage the first call is answered again, and none waited in the meantime", async (t) => {
    const proxy = await startProxy(t, url);
    const store = await open(t, proxy.url);
    await store.create("outage", task("kept"));
    proxy.close();
    for (let round = 0; round < 3; round++) {
      const calls = await Promise.allSettled(Array.from({ length: 40 }, () => titles(store, "outage")));
      // Any other reason, such as a time-out, would mean that calls queue up while there is no database.
      for (const call of calls) {
        const outcome = call.status === "rejected" ? String(call.reason) : "answered";
        assert.match(outcome, /ECONNREFUSED|ECONNRESET|Connection terminated/);
      }
      await assert.rejects(store.check());
    }
    proxy.listen();
    assert.deepEqual(await titles(store, "outage"), ["kept"]);
  });

  test("a network that swallows everything costs a bounded time", { timeout: BOUNDED }, async (t) => {
    const proxy = await startProxy(t, url);
    const store = await open(t, proxy.url);
    const callOften = () => Promise.allSettled(Array.from({ length: 20 }, () => store.check()));
    await callOften(); // now every connection of the pool is open
    proxy.passes = () => false;
    for (const call of await callOften()) {
      assert.match(call.status === "rejected" ? String(call.reason) : "answered", /timeout/);
    }
    proxy.passes = () => true;
    await store.check();
  });

  test("a store is closed although its network swallows everything", { timeout: BOUNDED }, async (t) => {
    const proxy = await startProxy(t, url);
    const store = await openTaskStore(proxy.url, () => {});
    proxy.passes = () => false;
    await store.close();
  });

  test("a task whose acknowledgement was lost is there, and its key gives it back", async (t) => {
    const proxy = await startProxy(t, url);
    const [cutOff, other] = [await open(t, proxy.url), await open(t, url)];
    const owner = randomUUID();
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

  describe("through a pooler", { skip: noPgBouncer }, () => {
    test("that takes no statement_timeout the store works, and says what to set in the database", async (t) => {
      const pooler = await startPgBouncer(url);
      t.after(pooler.close);
      const lines: string[] = [];
      const store = await open(t, pooler.url, (line) => lines.push(line));
      assert.equal((await store.create("pooled", task("kept")))?.title, "kept");
      assert.deepEqual(await titles(store, "pooled"), ["kept"]);
      assert.equal(lines.length, 1);
      assert.match(lines[0] ?? "", /ALTER ROLE .* SET statement_timeout/);
    });

    test("whose connections are fewer than the callers each is given their own tasks alone", async (t) => {
      const own = await postgres.newDatabase();
      const pooler = await startPgBouncer(own);
      t.after(pooler.close);
      const [store, other] = [await open(t, pooler.url), await open(t, pooler.url)];
      const wrong = await listMeanwhile(store, async () => {
        for (let count = 0; count < 20; count++) await other.create("busy", task(`${count}`));
        await query(own, "ALTER TABLE tasks ALTER due_at TYPE VARCHAR(40)");
        for (let count = 0; count < 20; count++) await other.create("busy", task(`${count}`));
      });
      assert.deepEqual(wrong, []);
    });

    test("that is started again the next call is answered", async (t) => {
      const pooler = await startPgBouncer(url);
      const store = await open(t, pooler.url);
      await pooler.close();
      await assert.rejects(store.check());
      t.after((await startPgBouncer(url, Number(new URL(pooler.url).port))).close);
      await store.check();
    });
  });
});

test("a database started again and again is left no connection too many", {
  skip: noPostgres,
  timeout: 60_000,
}, async (t) => {
  const postgres = await startPostgres();
  t.after(postgres.close);
  const store = await openTaskStore(postgres.url, () => {});
  const wrong = await listMeanwhile(store, async () => {
    for (let restart = 0; restart < 4; restart++) {
      await postgres.kill();
      await postgres.start();
      while (!await store.check().then(() => true, () => false));
    }
  });
  assert.deepEqual(wrong, []);
  assert.ok((await activity(postgres.url, "tasks")).length <= CONNECTIONS);
  await store.close();
  assert.deepEqual(await activity(postgres.url, "tasks"), []);
});
