/** The store's contract, the same in memory, on SQLite and on PostgreSQL; then the changes to its tables. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { cp, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, describe, mock, test } from "node:test";
import { pathToFileURL } from "node:url";
import { newTask, openTaskStore } from "../tools.ts";
import type { Task, TaskStore } from "../tools.ts";
import { noPostgres, queryOnce, startPostgres } from "./support/postgres.ts";
import type { Postgres } from "./support/postgres.ts";
import { noSqlite } from "./support/server.ts";

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

/** As another server does: the module read once more, with whatever it keeps for its own process. */
const another: typeof import("../tools.ts") = await import(`${import.meta.resolve("../tools.ts")}?another`);
const openAnother = (url: string) => another.openTaskStore(url, () => {});

/** Each opened twice, as two servers would: what holds within one must hold between them. `overshoot` is how many
 * tasks a user may have past the limit, when they are created at the same moment. */
const stores = [
  {
    name: "in memory",
    skip: false,
    overshoot: 0,
    async openTwo(): Promise<[TaskStore, TaskStore]> {
      const store = await open("memory:");
      return [store, store];
    },
  },
  {
    name: "on SQLite",
    skip: noSqlite,
    overshoot: 0,
    openTwo: () => Promise.all([open(`file:${directory}/tasks.db`), openAnother(`file:${directory}/tasks.db`)]),
  },
  {
    name: "on PostgreSQL",
    skip: noPostgres,
    overshoot: 19, // as many calls are under way at once as both have connections
    openTwo: () => Promise.all([open(postgres.url), openAnother(postgres.url)]),
  },
];

async function list(store: TaskStore, owner: string): Promise<Task[]> {
  return (await store.list(owner, { limit: 2_000 })).map(found);
}

const task = (title: string) => newTask({ title, notes: null, due_at: null });

const titles = (tasks: Task[]) => tasks.map(({ title }) => title);

/** A task that has to be there; with a prototype, which deep equality wants and SQLite's rows have not. */
function found(task: Task | undefined): Task {
  assert.ok(task !== undefined);
  return { ...task };
}

let stops = 0;

/** Stops the clock, later than a store has seen it; what it returns sets it, in milliseconds from where it stopped. */
function stopClock(): (milliseconds: number) => void {
  const now = Date.now() + 86_400_000 * ++stops;
  mock.timers.enable({ apis: ["Date"], now });
  return (milliseconds) => mock.timers.setTime(now + milliseconds);
}

afterEach(() => mock.timers.reset());

for (const { name, skip, overshoot, openTwo } of stores) {
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
      const created = found(await store.create(owner, newTask(fields)));
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
          await store.create(owner, newTask({ title: text, notes: text.repeat(10), due_at: null }), text),
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
        await store.create(owner, task(`${index}`));
      }
      assert.deepEqual(titles(await list(other, owner)), ["6", "5", "4", "3", "2", "1", "0"]);
    });

    test("tasks made in one millisecond by two servers stand in one order, whoever lists them", async () => {
      const owner = randomUUID();
      const setClock = stopClock();
      const made: Task[] = [];
      for (let time = 0; time < 10; time++) {
        setClock(time);
        const fields = { title: `${time}`, notes: null, due_at: null };
        made.push(found(await store.create(owner, newTask(fields))));
        const make = store === other ? newTask : another.newTask; // memory is one server's
        made.push(found(await other.create(owner, make(fields))));
      }
      const order = ({ created_at, id }: Task) => `${created_at} ${id}`;
      const expected = made.map(order).sort().reverse();
      assert.deepEqual((await list(store, owner)).map(order), expected);
      for (const [index, after] of (await list(store, owner)).entries()) {
        const rest = await other.list(owner, { after, limit: 20 });
        assert.deepEqual(rest.map(order), expected.slice(index + 1));
      }
    });

    test("pages lose and repeat nothing while tasks are added, changed and deleted", async () => {
      const owner = randomUUID();
      const setClock = stopClock();
      for (let index = 0; index < 34; index++) {
        setClock(index);
        await store.create(owner, task(`${index}`));
      }
      const expected = titles(await list(store, owner));
      const seen: Task[] = [];
      for (let page = 0; page < 4; page++) {
        seen.push(...await store.list(owner, { after: seen.at(-1), limit: 7 }));
        setClock(1_000 + page);
        await other.create(owner, task("added meanwhile"));
        const last = found(seen.at(-1));
        await other.update(owner, last.id, { ...last, status: "done" });
        await other.delete(owner, last.id); // which the next page starts after
        const unseen = found((await store.list(owner, { after: last, limit: 2 }))[1]);
        await other.delete(owner, unseen.id);
        expected.splice(expected.indexOf(unseen.title), 1);
      }
      assert.deepEqual(titles(seen), expected.slice(0, 28));
    });

    test("lists one status alone, page by page", async () => {
      const owner = randomUUID();
      const setClock = stopClock();
      for (let index = 0; index < 9; index++) {
        setClock(index);
        const status = (["todo", "in_progress", "done"] as const)[index % 3] ?? "todo";
        await store.create(owner, { ...task(`${index}`), status });
      }
      const [first, second, ...rest] = await store.list(owner, { status: "done", limit: 2 });
      assert.deepEqual([first?.title, second?.title, rest.length], ["8", "5", 0]);
      assert.deepEqual(titles(await store.list(owner, { status: "done", after: second, limit: 2 })), ["2"]);
    });

    test("an update changes what it names, clears what it sets to null, and leaves the rest", async () => {
      const owner = randomUUID();
      const fields = { title: "One", notes: "Two", due_at: "2026-12-01T08:00:00.000Z" };
      const created = found(await store.create(owner, newTask(fields)));
      let expected = created;
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
        assert.deepEqual(found(await store.update(owner, created.id, { ...change, updated_at })), expected);
        assert.deepEqual(await list(other, owner), [expected]);
      }
    });

    test("a task that is not there is neither changed nor deleted", async () => {
      const owner = randomUUID();
      const { id } = found(await store.create(owner, task("gone")));
      assert.equal(await store.delete(owner, id), true);
      for (const unknown of [id, randomUUID(), "no UUID", ""]) {
        assert.equal(await store.update(owner, unknown, task("back")), undefined);
        assert.equal(await other.delete(owner, unknown), false);
      }
      assert.deepEqual(await list(store, owner), []);
    });

    test("nobody reaches another's task", async () => {
      const [alice, mallory] = [randomUUID(), randomUUID()];
      const secret = found(await store.create(alice, task("secret"), "key"));
      assert.deepEqual(await list(store, mallory), []);
      assert.equal(await store.update(mallory, secret.id, { title: "mine", updated_at: secret.updated_at }), undefined);
      assert.equal(await store.delete(mallory, secret.id), false);
      assert.notEqual((await store.create(mallory, task("own"), "key"))?.id, secret.id);
      assert.deepEqual(await list(store, alice), [secret]);
    });

    test("a key gives the same task back while it exists, whatever else is sent", async () => {
      const owner = randomUUID();
      const first = found(await store.create(owner, task("first"), "key"));
      const changed = found(await store.update(owner, first.id, { status: "done", updated_at: first.updated_at }));
      assert.deepEqual(found(await other.create(owner, task("second"), "key")), changed);
      assert.notEqual((await store.create(owner, task("other"), "other key"))?.id, first.id);
      assert.notEqual((await store.create(owner, task("none")))?.id, (await store.create(owner, task("none")))?.id);
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

    test("a user has at most 1,000 tasks", async () => {
      const owner = randomUUID();
      const createAtOnce = (count: number) => {
        const instances = Array.from({ length: count / 2 }, () => [store, other]).flat();
        return Promise.all(instances.map((instance) => instance.create(owner, task("many"))));
      };
      for (let made = 0; made < 950; made += 50) await createAtOnce(50);
      const { id } = found(await store.create(owner, task("keyed"), "key"));
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

    test("can be asked whether it answers", () => store.check());
  });
}

/** Databases that keep what is in them, each with a way to look into it beside the store. */
const databases = [
  {
    name: "SQLite",
    skip: noSqlite,
    newUrl: () => Promise.resolve(`file:${directory}/${randomUUID()}.db`),
    async run(url: string, statement: string): Promise<Record<string, unknown>[]> {
      const { DatabaseSync } = await import("node:sqlite");
      const database = new DatabaseSync(url.slice("file:".length));
      const rows = database.prepare(statement).all();
      database.close();
      return rows;
    },
    slow: undefined, // no time-out of a call stops a statement here
  },
  {
    name: "PostgreSQL",
    skip: noPostgres,
    newUrl: () => postgres.newDatabase(),
    run: queryOnce,
    slow: "SELECT pg_sleep(3.5)",
  },
];

/** What opens a store in the template as somebody makes it their own: with one more change of the tables. */
async function changedWith(statements: string): Promise<(url: string) => Promise<TaskStore>> {
  const root = join(import.meta.dirname, "..");
  const project = await mkdtemp(join(directory, "project-"));
  await symlink(join(root, "node_modules"), join(project, "node_modules"));
  for (const name of ["package.json", "auth.ts"]) await cp(join(root, name), join(project, name));
  const tools = await readFile(join(root, "tools.ts"), "utf8");
  const end = tools.indexOf("\n];", tools.indexOf("\nconst MIGRATIONS = ["));
  assert.ok(end > 0);
  await writeFile(join(project, "tools.ts"), `${tools.slice(0, end)}\n  "${statements}",${tools.slice(end)}`);
  const changed: typeof import("../tools.ts") = await import(pathToFileURL(join(project, "tools.ts")).href);
  return (url) => changed.openTaskStore(url, () => {});
}

describe("the tables", { concurrency: true }, () => {
  for (const { name, skip, newUrl, run, slow } of databases) {
    describe(`on ${name}`, { skip, concurrency: true }, () => {
      const numbers = async (url: string) => (await run(url, "SELECT * FROM schema_changes")).map(Object.values);

      test("made by an earlier state are given what they lack, once, by servers that start at once", async () => {
        const url = await newUrl();
        const store = await open(url);
        const created = found(await store.create("owner", task("kept")));
        await store.close();
        const before = (await numbers(url)).length;

        const colour = "ALTER TABLE tasks ADD COLUMN colour TEXT";
        const openChanged = await changedWith(colour);
        const servers = await Promise.all([openChanged(url), openChanged(url)]);
        for (const server of servers) {
          assert.deepEqual(await list(server, "owner"), [created]);
          await server.close();
        }
        assert.equal((await numbers(url)).length, before + 1);
        assert.deepEqual((await run(url, "SELECT id, colour FROM tasks")).map(Object.values), [[created.id, null]]);

        const earlier = await open(url); // goes on, as where a release is taken back
        assert.deepEqual(await list(earlier, "owner"), [created]);
        await earlier.close();
      });

      test("stay as they are where a change fails, which stops the start until it is mended", async () => {
        const url = await newUrl();
        await (await open(url)).close();
        const [before, tasks] = [await numbers(url), await run(url, "SELECT * FROM tasks")];
        const colour = "ALTER TABLE tasks ADD COLUMN colour TEXT";
        const openFailing = await changedWith(`${colour}; ALTER TABLE nowhere ADD COLUMN x TEXT`);
        await assert.rejects(openFailing(url), /DATABASE_URL: .*nowhere/);
        assert.deepEqual([await numbers(url), await run(url, "SELECT * FROM tasks")], [before, tasks]);
        await (await (await changedWith(colour))(url)).close();
        assert.equal((await numbers(url)).length, before.length + 1);
      });

      test("may take longer to change than a call may take", { skip: slow === undefined }, async () => {
        const openSlowly = await changedWith(slow ?? "");
        await (await openSlowly(await newUrl())).close();
      });

      test("of the template's first state stop the start, with a line that says so", async () => {
        const url = await newUrl();
        await run(
          url,
          `CREATE TABLE tasks (
             id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, notes TEXT, status TEXT NOT NULL, due_at TEXT,
             created_at BIGINT NOT NULL, updated_at BIGINT NOT NULL, idempotency_key TEXT,
             UNIQUE (owner, created_at), UNIQUE (owner, idempotency_key))`,
        );
        await run(url, "CREATE TABLE health (id INTEGER PRIMARY KEY, checked_at BIGINT NOT NULL)");
        for (let start = 0; start < 2; start++) {
          await assert.rejects(open(url), /^Error: DATABASE_URL: .*tables of an older template/);
        }
      });
    });
  }
});
