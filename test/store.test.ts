/** What every store promises, in memory, on SQLite and on PostgreSQL; then migrations of earlier tables. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { newTask, openTaskStore, type Task, type TaskStore } from "../tools.ts";
import { noPostgres, type Postgres, queryOnce, startPostgres } from "./support/postgres.ts";
import { copyTemplate, noSqlite, readTemplate } from "./support/server.ts";

const directory = await mkdtemp(join(tmpdir(), "store-"));
let postgres: Postgres;

before(async () => {
  if (noPostgres === false) postgres = await startPostgres();
});

after(async () => {
  await postgres?.close();
  await rm(directory, { recursive: true });
});

const open = (url: string) => openTaskStore(url, () => {});
const newFile = () => `file:${directory}/${randomUUID()}.db`;

/** Each is opened twice, as by two servers, which must see the same tasks. */
const stores = [
  { name: "in memory", skip: false, newUrl: async () => "memory:" },
  { name: "on SQLite", skip: noSqlite, newUrl: async () => newFile() },
  // As many calls are under way at once as both have connections, so a user may have a few tasks past the limit.
  { name: "on PostgreSQL", skip: noPostgres, newUrl: () => postgres.newDatabase(), overshoot: 19 },
];

const list = (store: TaskStore, owner: string) => store.list(owner, { limit: 2_000 });

/** A task created now, or this many seconds after the beginning of 2027. */
const task = (title: string, seconds?: number): Task => ({
  ...newTask({ title, notes: null, due_at: null }),
  ...(seconds !== undefined && { created_at: new Date(Date.UTC(2027, 0, 1, 0, 0, seconds)).toISOString() }),
});

const titles = (tasks: Task[]) => tasks.map(({ title }) => title);

/** The task that a call must have given. */
const given = (task: Task | undefined): Task => task ?? assert.fail("There is no task");

for (const { name, skip, newUrl, overshoot = 0 } of stores) {
  describe(`a store ${name}`, { skip }, () => {
    let store: TaskStore;
    let other: TaskStore;

    before(async () => {
      const url = await newUrl();
      store = await open(url);
      other = url === "memory:" ? store : await open(url);
    });

    after(async () => {
      await store.close();
      await other.close();
    });

    test("a created task is there for every server, every character unchanged", async () => {
      const texts = [
        "'; DROP TABLE tasks; --",
        '"$1" ?1 :name %s \\ \\u0000 {}',
        "日本語 العربية עברית",
        "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00e9",
        "\u2028\u2029\u200f\ufeff \t\r\n",
        "\u{10ffff}".repeat(100),
      ];
      const owner = `auth0|${randomUUID()} é 👤 '`;
      for (const [index, title] of texts.entries()) {
        const created = { ...task(title, index), notes: title.repeat(10), due_at: "2026-12-01T08:00:00.000Z" };
        assert.deepEqual(await store.create(owner, created, title), created);
        assert.deepEqual(await other.create(owner, task("again"), title), created);
      }
      assert.deepEqual(titles(await list(other, owner)), texts.toReversed());
    });

    test("tasks are listed by created_at, then id, newest first, also where many have one millisecond", async () => {
      const owner = randomUUID();
      const created: Task[] = [];
      for (const [index, seconds] of [0, 0, 0, 9, 9, 5, 5, 5, 5, 0].entries()) {
        created.push(given(await [store, other][index % 2]?.create(owner, task(`${index}`, seconds))));
      }
      const order = (task: Task) => `${task.created_at} ${task.id}`;
      const expected = created.toSorted((a, b) => order(a) < order(b) ? 1 : -1);
      assert.deepEqual(await list(store, owner), expected);
      for (const [index, after] of expected.entries()) {
        assert.deepEqual(await other.list(owner, { after, limit: 20 }), expected.slice(index + 1));
      }
    });

    test("pages miss and repeat no task while others are added, changed and deleted", async () => {
      const owner = randomUUID();
      for (let index = 0; index < 34; index++) await store.create(owner, task(`${index}`, index));
      const expected = titles(await list(store, owner));
      const seen: Task[] = [];
      for (let page = 0; page < 4; page++) {
        seen.push(...await store.list(owner, { after: seen.at(-1), limit: 7 }));
        await other.create(owner, task("added meanwhile", 100 + page));
        const last = given(seen.at(-1));
        await other.update(owner, last.id, { ...last, status: "done" });
        await other.delete(owner, last.id); // which the next page starts after
        const unseen = given((await store.list(owner, { after: last, limit: 2 }))[1]);
        await other.delete(owner, unseen.id);
        expected.splice(expected.indexOf(unseen.title), 1);
      }
      assert.deepEqual(titles(seen), expected.slice(0, 28));
    });

    test("a list of one status holds no other, page by page", async () => {
      const owner = randomUUID();
      for (let index = 0; index < 9; index++) {
        const status = (["todo", "in_progress", "done"] as const)[index % 3] ?? "todo";
        await store.create(owner, { ...task(`${index}`, index), status });
      }
      const [first, second, ...rest] = await store.list(owner, { status: "done", limit: 2 });
      assert.deepEqual([first?.title, second?.title, rest.length], ["8", "5", 0]);
      assert.deepEqual(titles(await store.list(owner, { status: "done", after: second, limit: 2 })), ["2"]);
    });

    test("an update changes what it names, clears what it sets to null, and leaves the rest", async () => {
      const owner = randomUUID();
      let expected = newTask({ title: "One", notes: "Two", due_at: "2026-12-01T08:00:00.000Z" });
      await store.create(owner, expected);
      const changes = [
        { title: "Three" },
        { notes: null },
        { due_at: null },
        { status: "done" },
        {},
        { title: "Four", notes: "Five", due_at: "2027-01-01T00:00:00.000Z", status: "in_progress" },
      ] as const;
      for (const [index, change] of changes.entries()) {
        const updated_at = new Date(index).toISOString();
        expected = { ...expected, ...change, updated_at };
        assert.deepEqual(await store.update(owner, expected.id, { ...change, updated_at }), expected);
        assert.deepEqual(await list(other, owner), [expected]);
      }
    });

    test("a task that is not there is neither changed nor deleted", async () => {
      const owner = randomUUID();
      const { id } = given(await store.create(owner, task("gone")));
      assert.equal(await store.delete(owner, id), true);
      for (const unknown of [id, randomUUID(), "no UUID", ""]) {
        assert.equal(await store.update(owner, unknown, task("back")), undefined);
        assert.equal(await other.delete(owner, unknown), false);
      }
      assert.deepEqual(await list(store, owner), []);
    });

    test("no user reaches another user's task", async () => {
      const [alice, mallory] = [randomUUID(), randomUUID()];
      const secret = given(await store.create(alice, task("secret"), "key"));
      assert.deepEqual(await list(store, mallory), []);
      assert.deepEqual(await store.list(mallory, { after: { created_at: "9999", id: "" }, limit: 9 }), []);
      assert.equal(await store.update(mallory, secret.id, { title: "mine", updated_at: secret.updated_at }), undefined);
      assert.equal(await store.delete(mallory, secret.id), false);
      assert.notEqual((await store.create(mallory, task("own"), "key"))?.id, secret.id);
      assert.deepEqual(await list(store, alice), [secret]);
    });

    test("an idempotency key returns the same task while that exists, whatever else is sent", async () => {
      const owner = randomUUID();
      const first = given(await store.create(owner, task("first"), "key"));
      const changed = given(await store.update(owner, first.id, { status: "done", updated_at: first.updated_at }));
      assert.deepEqual(await other.create(owner, task("second"), "key"), changed);
      assert.notEqual((await store.create(owner, task("other"), "other key"))?.id, first.id);
      assert.notEqual((await store.create(owner, task("none")))?.id, (await store.create(owner, task("none")))?.id);
      await store.delete(owner, first.id);
      assert.equal((await other.create(owner, task("third"), "key"))?.title, "third");
    });

    test("an idempotency key sent many times at once creates one task", async () => {
      const owner = randomUUID();
      const both = Array.from({ length: 20 }, () => [store, other]).flat();
      const created = await Promise.all(both.map((instance) => instance.create(owner, task("one"), "key")));
      assert.equal(new Set(created.map((one) => given(one).id)).size, 1);
      assert.equal((await list(store, owner)).length, 1);
    });

    test("a user has at most 1,000 tasks", async () => {
      const owner = randomUUID();
      const createAtOnce = (count: number) => {
        const instances = Array.from({ length: count / 2 }, () => [store, other]).flat();
        return Promise.all(instances.map((instance) => instance.create(owner, task("many"))));
      };
      for (let made = 0; made < 950; made += 50) await createAtOnce(50);
      const { id } = given(await store.create(owner, task("keyed"), "key"));
      const last = (await createAtOnce(100)).filter((one) => one !== undefined);
      const tasks = await list(store, owner);
      assert.equal(tasks.length, 951 + last.length);
      assert.ok(tasks.length >= 1_000 && tasks.length <= 1_000 + overshoot, `${tasks.length} tasks`);

      assert.equal((await store.create(owner, task("again"), "key"))?.id, id);
      assert.equal(await store.create(owner, task("too many"), "new key"), undefined);
      assert.ok(await store.create(randomUUID(), task("of another")) !== undefined);
      for (const { id } of tasks.slice(999)) await store.delete(owner, id);
      assert.ok(await other.create(owner, task("room again"), "new key") !== undefined);
      assert.equal(await store.create(owner, task("too many")), undefined);
    });

    test("a store that answers passes its check", () => store.check());
  });
}

const sqlite = {
  name: "SQLite",
  skip: noSqlite,
  newUrl: async () => newFile(),
  async query(url: string, statement: string): Promise<Record<string, unknown>[]> {
    const { DatabaseSync } = await import("node:sqlite");
    const database = new DatabaseSync(pathOf(url));
    const rows = database.prepare(statement).all();
    database.close();
    return rows;
  },
  /** SQLite deletes this file with the last connection. */
  assertClosed: async (url: string) => assert.ok(!existsSync(`${pathOf(url)}-wal`), "It is still open"),
};

/** Databases that keep what is in them, each with a way to look into it beside the store. */
const databases = [
  sqlite,
  {
    name: "PostgreSQL",
    skip: noPostgres,
    newUrl: () => postgres.newDatabase(),
    query: queryOnce,
    /** PostgreSQL waits for connections that are being closed, for five seconds, and then refuses. */
    assertClosed: async (url: string) => void await postgres.query(`DROP DATABASE ${nameOf(url)}`),
  },
];

const nameOf = (url: string) => new URL(url).pathname.slice(1);
const pathOf = (url: string) => url.slice("file:".length);

/** The `openTaskStore` of a copy of the template: without some packages, or with another migration. */
async function openerOfCopy({ without = [] as string[], migration = "" }) {
  const copy = await copyTemplate(["package.json", "auth.ts"], { parent: directory, without });
  const tools = readTemplate("tools.ts");
  const end = tools.indexOf("\n];", tools.indexOf("\nconst MIGRATIONS = ["));
  assert.ok(end > 0);
  const added = migration === "" ? "" : `\n  ${JSON.stringify(migration)},`;
  await writeFile(join(copy, "tools.ts"), tools.slice(0, end) + added + tools.slice(end));
  const changed: typeof import("../tools.ts") = await import(pathToFileURL(join(copy, "tools.ts")).href);
  return (url: string) => changed.openTaskStore(url, () => {});
}

/** The columns that the tables of all releases have. */
const TEXTS =
  "id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, notes TEXT, status TEXT NOT NULL, due_at TEXT";
const COLOUR = "ALTER TABLE tasks ADD COLUMN colour TEXT";

describe("tables", { concurrency: true }, () => {
  for (const { name, skip, newUrl, query, assertClosed } of databases) {
    describe(`on ${name}`, { skip, concurrency: true }, () => {
      const numbers = async (url: string) => (await query(url, "SELECT * FROM schema_changes")).map(Object.values);

      test("tables of the previous release are opened with all tasks and idempotency keys", async () => {
        const url = await newUrl();
        const time = (seconds: number) => new Date(Date.UTC(2026, 10, 1, 0, 0, seconds)).toISOString();
        const old = [1, 0].map((number) => ({
          ...newTask({ title: `Task ${number}`, notes: `${"x".repeat(3_999)}\u0001`, due_at: time(60) }),
          created_at: time(number),
        }));
        const statements = [
          "CREATE TABLE schema_changes (number INTEGER PRIMARY KEY)",
          "INSERT INTO schema_changes VALUES (0)",
          `CREATE TABLE tasks (${TEXTS}, created_at TEXT NOT NULL, updated_at TEXT NOT NULL, idempotency_key TEXT,
             UNIQUE (owner, idempotency_key))`,
          "CREATE INDEX tasks_by_time ON tasks (owner, created_at, id)",
          ...old.map((task) =>
            `INSERT INTO tasks (owner, idempotency_key, ${Object.keys(task).join(", ")})
               VALUES ('owner', 'key of ${task.title}', '${Object.values(task).join("', '")}')`
          ),
        ];
        for (const statement of statements) await query(url, statement);

        const store = await open(url);
        assert.deepEqual(await list(store, "owner"), old);
        for (const one of old) assert.deepEqual(await store.create("owner", task("x"), `key of ${one.title}`), one);
        const created = given(await store.create("owner", task("new", 0)));
        assert.deepEqual(await list(store, "owner"), [created, ...old]);
        await store.close();
      });

      test("tables of an earlier release are migrated once, also by servers that start together", async () => {
        const url = await newUrl();
        const store = await open(url);
        const created = given(await store.create("owner", task("kept")));
        await store.close();
        const before = (await numbers(url)).length;

        const openChanged = await openerOfCopy({ migration: COLOUR });
        const changed = await Promise.all([openChanged(url), openChanged(url)]);
        assert.equal((await numbers(url)).length, before + 1);
        assert.deepEqual((await query(url, "SELECT id, colour FROM tasks")).map(Object.values), [[created.id, null]]);

        for (const server of [...changed, await open(url)]) { // as after a rollback to this release
          assert.deepEqual(await list(server, "owner"), [created]);
          await server.close();
        }
      });

      test("a migration that fails stops the start, and leaves the database unchanged and closed", async () => {
        const url = await newUrl();
        await (await open(url)).close();
        const [before, tasks] = [await numbers(url), await query(url, "SELECT * FROM tasks")];
        const openFailing = await openerOfCopy({ migration: `${COLOUR}; ALTER TABLE nowhere ADD COLUMN x TEXT` });
        await assert.rejects(openFailing(url), /DATABASE_URL: .*nowhere/);
        assert.deepEqual([await numbers(url), await query(url, "SELECT * FROM tasks")], [before, tasks]);
        await (await (await openerOfCopy({ migration: COLOUR }))(url)).close();
        assert.equal((await numbers(url)).length, before.length + 1);
        await assertClosed(url);
      });

      test("tables of the template's first release stop the start with a line that says so", async () => {
        const url = await newUrl();
        const created = "created_at BIGINT NOT NULL, updated_at BIGINT NOT NULL, idempotency_key TEXT";
        const unique = "UNIQUE (owner, created_at), UNIQUE (owner, idempotency_key)";
        await query(url, `CREATE TABLE tasks (${TEXTS}, ${created}, ${unique})`);
        await query(url, "CREATE TABLE health (id INTEGER PRIMARY KEY, checked_at BIGINT NOT NULL)");
        for (let start = 0; start < 2; start++) {
          await assert.rejects(open(url), /^Error: DATABASE_URL: .*tables of an older template/);
        }
      });
    });
  }
});

describe("a store's file", { skip: noSqlite }, () => {
  test("what follows file: is the path of the database, character by character", async () => {
    const path = join(directory, "50%41 #1.db"); // a URL's path would end before the #
    await (await open(`file:${path}`)).close();
    assert.ok(existsSync(path));
  });

  test("a write on SQLite has reached the disk when it is acknowledged", async () => {
    const url = newFile();
    // The store's own connection says how it writes: to the disk (FULL), or to the system's memory.
    const openObserved = await openerOfCopy({ migration: "CREATE TABLE observed AS SELECT * FROM pragma_synchronous" });
    await (await openObserved(url)).close();
    const FULL = 2;
    assert.deepEqual((await sqlite.query(url, "SELECT * FROM observed")).map(Object.values), [[FULL]]);
  });

  test("no call on SQLite reads or sorts the tasks of other users", async (t) => {
    const { DatabaseSync } = await import("node:sqlite");
    const url = newFile();
    const store = await open(url);
    const prepare = t.mock.method(DatabaseSync.prototype, "prepare");
    const created = given(await store.create("owner", task("one"), "key"));
    await store.create("owner", task("again"), "key");
    await store.list("owner", { status: "todo", after: created, limit: 20 });
    await store.update("owner", created.id, { title: "changed" });
    await store.delete("owner", created.id);
    const statements = prepare.mock.calls.map(({ arguments: [sql] }) => sql);
    prepare.mock.restore();
    await store.close();
    assert.equal(statements.length, 5);
    for (const sql of statements) {
      for (const { detail } of await sqlite.query(url, `EXPLAIN QUERY PLAN ${sql}`)) {
        assert.doesNotMatch(String(detail), /SCAN tasks|TEMP B-TREE/, sql);
      }
    }
  });
});

test("a migration on PostgreSQL may take longer than a call may", { skip: noPostgres }, async () => {
  const url = await postgres.newDatabase();
  await postgres.query(`ALTER DATABASE ${nameOf(url)} SET statement_timeout = '2500ms'`); // for calls
  const openSlowly = await openerOfCopy({ migration: "SELECT pg_sleep(3.5)" });
  await (await openSlowly(url)).close();
});

test("without the driver of PostgreSQL the start fails with one line that says how to install it", async () => {
  const openWithout = await openerOfCopy({ without: ["pg"] });
  await assert.rejects(
    openWithout("postgres://tasks@127.0.0.1/tasks"),
    /^Error: DATABASE_URL: .*its driver is missing, run: npm install --save-prod pg$/,
  );
});
