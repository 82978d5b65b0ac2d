/** The store's contract, the same on memory, SQLite and PostgreSQL; then what PostgreSQL owes besides. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { copyFile, mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import * as net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, describe, mock, test } from "node:test";
import type { TestContext } from "node:test";
import { pathToFileURL } from "node:url";
import { openTaskStore } from "../tools.ts";
import type { Task, TaskStore } from "../tools.ts";
import { noPostgres, startPostgres } from "./support/postgres.ts";
import type { Postgres } from "./support/postgres.ts";
import { freePort } from "./support/server.ts";

const noSqlite = await import("node:sqlite").then(() => false, () => "this runtime has no node:sqlite");

let directory: string;
let postgres: Postgres;

before(async () => {
  directory = await mkdtemp(join(tmpdir(), "store-"));
  if (noPostgres === false) postgres = await startPostgres();
});

after(async () => {
  await postgres?.close();
  await rm(directory, { recursive: true });
});

const open = (url: string) => openTaskStore(url, () => {});

/** Each opened twice, as two servers would: what holds within one must hold between them. */
const stores = [
  {
    name: "in memory",
    skip: false,
    async openTwo(): Promise<[TaskStore, TaskStore]> {
      const store = await open("memory:");
      return [store, store];
    },
  },
  {
    name: "on SQLite",
    skip: noSqlite,
    openTwo: () => Promise.all([open(`file:${directory}/tasks.db`), open(`file:${directory}/tasks.db`)]),
  },
  {
    name: "on PostgreSQL",
    skip: noPostgres,
    openTwo: () => Promise.all([open(postgres.url), open(postgres.url)]),
  },
];

const NEWEST = Number.MAX_SAFE_INTEGER;

const list = (store: TaskStore, owner: string) => store.list(owner, { before: NEWEST, limit: 2_000 });

const task = (title: string) => ({ title, notes: null, due_at: null });

const titles = (tasks: Task[]) => tasks.map(({ title }) => title);

/** A task that has to be there. */
function found(task: Task | undefined): Task {
  assert.ok(task !== undefined);
  return task;
}

/** Stops the clock; what it returns sets it, in milliseconds from where it stopped. */
function stopClock(): (milliseconds: number) => void {
  const now = Date.now();
  mock.timers.enable({ apis: ["Date"], now });
  return (milliseconds) => mock.timers.setTime(now + milliseconds);
}

afterEach(() => mock.timers.reset());

for (const { name, skip, openTwo } of stores) {
  describe(`a store ${name}`, { skip }, () => {
    let store: TaskStore;
    let other: TaskStore;

    before(async () => {
      [store, other] = await openTwo();
    });

    after(async () => {
      await store.close();
      await other.close();
    });

    test("gives back what was created, to every instance", async () => {
      const owner = randomUUID();
      const fields = { title: "Pay rent", notes: "by bank", due_at: "2026-12-01T08:00:00.000Z" };
      const created = found(await store.create(owner, fields));
      const { id, created_at, updated_at } = created;
      assert.deepEqual(created, { ...fields, id, status: "todo", created_at, updated_at });
      assert.match(id, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
      assert.equal(new Date(created_at).toISOString(), created_at);
      assert.equal(updated_at, created_at);
      assert.deepEqual(await list(other, owner), [created]);
    });

    test("keeps every character as it came", async () => {
      const texts = [
        "'; DROP TABLE tasks; --",
        '"$1" ?1 :name %s \\ \\u0000 {}',
        "日本語 العربية עברית",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00e9",
        "\u2028\u2029\u200f\ufeff \t\r\n",
        "\u{10ffff}".repeat(100),
      ];
      const owner = `auth0|${randomUUID()} é 👤 '`;
      for (const text of texts) {
        const created = found(
          await store.create(owner, { title: text, notes: text.repeat(10), due_at: null }, text),
        );
        assert.equal(created.title, text);
        assert.equal(created.notes, text.repeat(10));
        assert.equal((await other.create(owner, task("again"), text))?.id, created.id);
      }
      assert.deepEqual(titles(await list(other, owner)), texts.toReversed());
    });

    test("lists the newest first, even within a millisecond and when the clock steps back", async () => {
      const owner = randomUUID();
      const setClock = stopClock();
      for (const [index, time] of [0, 0, 0, -3_600_000, -3_600_000, 0, 5].entries()) {
        setClock(time);
        await (index % 2 ? store : other).create(owner, task(`${index}`));
      }
      const tasks = await list(store, owner);
      assert.deepEqual(titles(tasks), ["6", "5", "4", "3", "2", "1", "0"]);
      const times = tasks.map(({ created_at }) => created_at);
      assert.deepEqual(times, [...new Set(times)].sort().reverse());
    });

    test("pages lose and repeat nothing while tasks are added and deleted", async () => {
      const owner = randomUUID();
      stopClock();
      const made: Task[] = [];
      for (let index = 0; index < 30; index++) made.push(found(await store.create(owner, task(`${index}`))));
      const seen: Task[] = [];
      for (let page = 0; page < 4; page++) {
        const last = seen.at(-1);
        const before = last === undefined ? NEWEST : Date.parse(last.created_at);
        seen.push(...await store.list(owner, { before, limit: 7 }));
        await other.create(owner, task("added meanwhile"));
        await other.delete(owner, found(seen.at(-1)).id); // which the next page starts after
        await other.delete(owner, found(made[page]).id); // which was not seen yet
      }
      const expected = titles(made).slice(3).toReversed();
      assert.deepEqual(titles(seen), expected);
    });

    test("lists one status alone, page by page", async () => {
      const owner = randomUUID();
      for (let index = 0; index < 9; index++) {
        const { id } = found(await store.create(owner, task(`${index}`)));
        const status = (["todo", "in_progress", "done"] as const)[index % 3];
        await other.update(owner, id, { status });
      }
      const [first, second, ...rest] = await store.list(owner, { status: "done", before: NEWEST, limit: 2 });
      assert.deepEqual([first?.title, second?.title, rest.length], ["8", "5", 0]);
      const before = Date.parse(found(second).created_at);
      assert.deepEqual(titles(await store.list(owner, { status: "done", before, limit: 2 })), ["2"]);
    });

    test("an update changes what it names, clears what it sets to null, and leaves the rest", async () => {
      const owner = randomUUID();
      const setClock = stopClock();
      const created = found(
        await store.create(owner, { title: "One", notes: "Two", due_at: "2026-12-01T08:00:00.000Z" }),
      );
      let expected = created;
      const changes = [
        { title: "Three" },
        { notes: null },
        { due_at: null, title: undefined },
        { status: "done" },
        {},
        { title: "Four", notes: "Five", due_at: "2027-01-01T00:00:00.000Z", status: "in_progress" },
      ] as const;
      for (const [index, change] of changes.entries()) {
        setClock((index + 1) * 1_000);
        const given = Object.entries(change).filter(([, value]) => value !== undefined);
        expected = { ...expected, ...Object.fromEntries(given), updated_at: new Date().toISOString() };
        assert.deepEqual(await store.update(owner, created.id, change), expected);
        assert.deepEqual(await list(other, owner), [expected]);
      }
    });

    test("a task that is not there is neither changed nor deleted", async () => {
      const owner = randomUUID();
      const { id } = found(await store.create(owner, task("gone")));
      assert.equal(await store.delete(owner, id), true);
      for (const unknown of [id, randomUUID(), "no UUID", ""]) {
        assert.equal(await store.update(owner, unknown, { title: "back" }), undefined);
        assert.equal(await other.delete(owner, unknown), false);
      }
      assert.deepEqual(await list(store, owner), []);
    });

    test("nobody reaches another's task", async () => {
      const [alice, mallory] = [randomUUID(), randomUUID()];
      const secret = found(await store.create(alice, task("secret"), "key"));
      assert.deepEqual(await list(store, mallory), []);
      assert.equal(await store.update(mallory, secret.id, { title: "mine" }), undefined);
      assert.equal(await store.delete(mallory, secret.id), false);
      assert.notEqual((await store.create(mallory, task("own"), "key"))?.id, secret.id);
      assert.deepEqual(await list(store, alice), [secret]);
    });

    test("a key gives the same task back while it exists, whatever else is sent", async () => {
      const owner = randomUUID();
      const first = found(await store.create(owner, task("first"), "key"));
      const changed = found(await store.update(owner, first.id, { status: "done" }));
      assert.deepEqual(await other.create(owner, task("second"), "key"), changed);
      assert.notEqual((await store.create(owner, task("other"), "other key"))?.id, first.id);
      assert.notEqual(
        (await store.create(owner, task("none")))?.id,
        (await store.create(owner, task("none")))?.id,
      );
      await store.delete(owner, first.id);
      assert.equal((await other.create(owner, task("third"), "key"))?.title, "third");
    });

    test("a key sent many times at once makes one task", async () => {
      const owner = randomUUID();
      const both = Array.from({ length: 20 }, () => [store, other]).flat();
      const created = await Promise.all(both.map((instance) => instance.create(owner, task("one"), "key")));
      assert.equal(new Set(created.map((one) => found(one).id)).size, 1);
      assert.equal((await list(store, owner)).length, 1);
    });

    test("a user has at most 1,000 tasks, however many are created at once", async () => {
      const owner = randomUUID();
      const createAtOnce = (count: number) => {
        const instances = Array.from({ length: count / 2 }, () => [store, other]).flat();
        return Promise.all(instances.map((instance) => instance.create(owner, task("many"))));
      };
      for (let made = 0; made < 950; made += 50) await createAtOnce(50);
      const { id } = found(await store.create(owner, task("keyed"), "key"));
      const last = await createAtOnce(60);
      assert.equal(last.filter((one) => one !== undefined).length, 49);
      assert.equal((await list(store, owner)).length, 1_000);

      assert.equal((await store.create(owner, task("again"), "key"))?.id, id);
      assert.equal(await store.create(owner, task("too many"), "new key"), undefined);
      assert.ok(await store.create(randomUUID(), task("of another")) !== undefined);
      await store.delete(owner, id);
      assert.ok(await other.create(owner, task("room again"), "new key") !== undefined);
    });

    test("takes writes", () => store.check());
  });
}

describe("PostgreSQL", { skip: noPostgres, concurrency: true, timeout: 60_000 }, () => {
  /** Runs a statement beside the store. */
  async function run(statement: string): Promise<Record<string, unknown>[]> {
    const { default: connect } = await import("postgres");
    const sql = connect(postgres.url, { max: 1 });
    const rows = await sql.unsafe(statement);
    await sql.end();
    return rows;
  }

  /** Stands between a store and the database, to be what a network can be. */
  async function startProxy(t: TestContext) {
    const sockets = new Set<net.Socket>();
    const server = net.createServer((client) => {
      const database = net.connect(Number(new URL(postgres.url).port), "127.0.0.1");
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
      url: postgres.url.replace(/:\d+\//, `:${port}/`),
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

  test("instances that open an empty database at once agree on its tables", async () => {
    await run("CREATE DATABASE empty");
    const url = new URL("/empty", postgres.url).href;
    const instances = await Promise.all(Array.from({ length: 8 }, () => open(url)));
    for (const instance of instances) await instance.close();
  });

  test("TLS is as the URL's sslmode says", async () => {
    for (const [mode, isEncrypted] of [["disable", false], ["require", true]] as const) {
      const store = await open(`${postgres.url}?sslmode=${mode}&application_name=${mode}`);
      const connections = await run(
        `SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = '${mode}'`,
      );
      assert.deepEqual(new Set(connections.map(({ ssl }) => ssl)), new Set([isEncrypted]));
      await store.close();
    }
    await assert.rejects(
      open(`${postgres.url}?sslmode=verify-full`),
      /DATABASE_URL: .*self-signed certificate/,
    );
  });

  test("a database that cannot be reached is one line at the start, without its password", async (t) => {
    const silent = net.createServer(() => {}).listen(0, "127.0.0.1");
    await once(silent, "listening");
    t.after(() => silent.close());
    const ports = { refused: await freePort(), silent: (silent.address() as net.AddressInfo).port };
    for (const port of Object.values(ports)) {
      await assert.rejects(open(`postgres://tasks:hunter2@127.0.0.1:${port}/tasks`), ({ message }: Error) => {
        assert.match(message, /^DATABASE_URL: PostgreSQL cannot be used: .*(ECONNREFUSED|TIMEOUT)/);
        return !/hunter2|\n/.test(message);
      });
    }
    await assert.rejects(
      open(postgres.url.replace(/:[^:]+@/, ":hunter2@")),
      /password authentication failed/,
    );
  });

  test("a driver that is not installed is one line that says how to install it", async () => {
    const project = join(directory, "project");
    await mkdir(join(project, "node_modules"), { recursive: true });
    for (const name of ["@modelcontextprotocol", "jose", "zod"]) {
      await symlink(`${import.meta.dirname}/../node_modules/${name}`, join(project, "node_modules", name));
    }
    for (const name of ["tools.ts", "auth.ts", "package.json"]) {
      await copyFile(`${import.meta.dirname}/../${name}`, join(project, name));
    }
    const { openTaskStore } = await import(pathToFileURL(join(project, "tools.ts")).href);
    await assert.rejects(
      openTaskStore(postgres.url, () => {}),
      /^Error: DATABASE_URL: .*npm install postgres$/,
    );
  });

  test("after an outage the first call is answered again, and none waited in the meantime", async (t) => {
    const proxy = await startProxy(t);
    const store = await open(proxy.url);
    t.after(() => store.close());
    const { id } = found(await store.create("outage", task("kept")));
    proxy.close();
    for (let round = 0; round < 3; round++) {
      const calls = await Promise.allSettled(Array.from({ length: 40 }, () => list(store, "outage")));
      // Any other reason, such as our own time-out, would mean that calls queue up while there is no database.
      for (const call of calls) {
        const outcome = call.status === "rejected" ? String(call.reason) : "answered";
        assert.match(outcome, /ECONNREFUSED|CONNECTION_CLOSED/);
      }
      await assert.rejects(store.check());
    }
    proxy.listen();
    assert.deepEqual((await list(store, "outage")).map((one) => one.id), [id]);
    await store.check();
  });

  test("a network that swallows everything costs a bounded time, and the connections in use then", async (t) => {
    const proxy = await startProxy(t);
    const store = await open(proxy.url);
    t.after(() => store.close());
    const callOften = () => Promise.allSettled(Array.from({ length: 20 }, () => list(store, "swallowed")));
    await callOften(); // now every connection of the pool is open
    proxy.passes = () => false;
    const calls = await callOften();
    assert.ok(calls.every(({ status }) => status === "rejected"));
    proxy.passes = () => true;
    assert.deepEqual(await list(store, "swallowed"), []);
  });

  test("an instance that vanishes in the middle of a write holds nobody up for long", async (t) => {
    const proxy = await startProxy(t);
    const [vanishing, other] = [await open(proxy.url), await open(postgres.url)];
    const owner = randomUUID();
    let isAsked = false; // for the owner's lock: the answer, and all after it, is swallowed
    const locked = new Promise<void>((resolve) => {
      proxy.passes = (data, isFromDatabase) => {
        if (isAsked && isFromDatabase) resolve();
        isAsked ||= data.includes(owner);
        return !isAsked || !isFromDatabase;
      };
    });
    const lost = vanishing.create(owner, task("lost")).catch(() => undefined);
    await locked;
    assert.equal((await other.create(owner, task("kept")))?.title, "kept");
    await Promise.all([vanishing.close(), other.close()]);
    await lost;
  });
});
