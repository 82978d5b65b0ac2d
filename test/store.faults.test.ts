/** Store faults, stop and restart: mostly with the server as its own process, so that what happens to it is real. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { chmod, mkdir, mkdtemp, open, rm, writeFile } from "node:fs/promises";
import * as http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { json } from "node:stream/consumers";
import { after, before, describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { newTask, openTaskStore } from "../tools.ts";
import type { Task, TaskStore } from "../tools.ts";
import { freePort, noSqlite, spawnServer, startServer, until } from "./support/server.ts";
import type { ServerProcess } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

/** Most faults would show as a wait without end. */
const timeout = 60_000;
const onSqlite = { skip: noSqlite, timeout };

let tenant: Tenant;
let directory: string;

before(async () => {
  tenant = await startTenant();
  directory = await mkdtemp(join(tmpdir(), "faults-"));
  await chmod(directory, 0o755); // for `asNobody`
});

/** What tests have opened. Inside `describe`, Deno 2 never calls what `t.after` is given. */
const closing: (() => unknown)[] = [];

after(async () => {
  for (const close of closing.toReversed()) await close();
  await tenant.close();
  await rm(directory, { recursive: true });
});

const newFile = () => join(directory, `${randomUUID()}.db`);

/** As another process would: the server's is another. */
async function openFile(file: string) {
  const { DatabaseSync } = await import("node:sqlite");
  const database = new DatabaseSync(file);
  closing.push(() => database.close());
  return database;
}

const urlOf = (port: number) => `http://127.0.0.1:${port}/mcp`;

function environment(port: number, databaseUrl: string): Record<string, string> {
  return {
    AUTH0_DOMAIN: tenant.origin,
    MCP_SERVER_URL: urlOf(port),
    PORT: String(port),
    DATABASE_URL: databaseUrl,
  };
}

async function startProcess(port: number, databaseUrl: string): Promise<ServerProcess> {
  const server = spawnServer(environment(port, databaseUrl));
  closing.push(() => {
    server.kill("SIGKILL");
    return server.exited;
  });
  await server.ready;
  return server;
}

/** In the test's own process. */
async function startHere(port: number, databaseUrl: string, store?: TaskStore) {
  closing.push((await startServer(environment(port, databaseUrl), store)).close);
}

interface Answer {
  text: string;
  /** Undefined in a tool error. */
  data: unknown;
}

/** A user of the server on a port, with one connection to it. A call rejects when it gets no reply. */
async function newUser(port: number, subject = `auth0|${randomUUID()}`) {
  const headers = {
    authorization: `Bearer ${await tenant.sign({ aud: urlOf(port), sub: subject })}`,
    accept: "application/json, text/event-stream",
    "content-type": "application/json",
  };
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });

  async function call(name: string, input: object = {}): Promise<Answer> {
    const message = { jsonrpc: "2.0", id: 1, method: "tools/call", params: { name, arguments: input } };
    const request = http.request(urlOf(port), { method: "POST", headers, agent });
    request.end(JSON.stringify(message));
    const [reply] = await once(request, "response");
    const { result } = await json(reply) as {
      result: { content: [{ text: string }]; structuredContent: unknown; isError?: boolean };
    };
    return { text: result.content[0].text, data: result.isError ? undefined : result.structuredContent };
  }

  return {
    subject,
    call,
    async create(title: string, idempotency_key: string = randomUUID()): Promise<Task> {
      const { text, data } = await call("create_task", { title, idempotency_key });
      return (data as { task: Task } | undefined)?.task ?? assert.fail(text);
    },
    /** Newest first. */
    async titles(): Promise<string[]> {
      const { text, data } = await call("list_tasks", { limit: 100 });
      return (data as { tasks: Task[] } | undefined)?.tasks.map(({ title }) => title) ?? assert.fail(text);
    },
  };
}

type User = Awaited<ReturnType<typeof newUser>>;

/** Creates a task for each title through these users, who go on until all is done: how calls failed meanwhile. */
async function createAll(users: User[], titles: string[], onCreated: (count: number) => void): Promise<string[]> {
  const left = [...titles];
  const failures: string[] = [];
  let created = 0;
  await Promise.all(users.map(async (user) => {
    for (let title = left.pop(); title !== undefined; title = left.pop()) {
      try {
        await user.create(title, title);
        onCreated(++created);
      } catch (error) {
        failures.push(String(error));
        left.push(title);
        await delay(20); // a client's own pause before it tries again
      }
    }
  }));
  return failures;
}

const numbered = (count: number) => Array.from({ length: count }, (_, index) => String(index).padStart(3, "0"));

const health = async (port: number) => (await fetch(`http://127.0.0.1:${port}/health`)).status;

/** A tool error that says what to do, and nothing of how the server is made. */
function assertReadable({ text, data }: Answer) {
  assert.equal(data, undefined);
  assert.match(text, /^\w+ failed, and the server's log says why\. Try again/);
  assert.doesNotMatch(text, /SQL|database|Error|\n|\.ts/i);
}

/** Root may write to whatever it likes, so for a while it has to be somebody else. */
async function asNobody<T>(work: () => Promise<T>): Promise<T> {
  if (process.getuid?.() !== 0) return await work();
  process.seteuid?.(65_534);
  try {
    return await work();
  } finally {
    process.seteuid?.(0);
  }
}

test("a place that cannot be written to stops the start, the file new or old", onSqlite, async () => {
  const place = join(directory, "read-only");
  await mkdir(place);
  const old = join(place, "old.db");
  await (await openTaskStore(`file:${old}`, () => {})).close();
  await chmod(old, 0o444);
  for (const [mode, name, why] of [[0o555, "new.db", "unable to open"], [0o777, "old.db", "readonly"]] as const) {
    await chmod(place, mode);
    const opened = asNobody(() => openTaskStore(`file:${join(place, name)}`, () => {}));
    await assert.rejects(opened, new RegExp(`DATABASE_URL: .*${name} cannot be used: .*${why}`));
  }
});

describe("a file at fault", { ...onSqlite, concurrency: true }, () => {
  test("stops the start, with one line that says why", async () => {
    const [garbage, locked] = [newFile(), newFile()];
    await writeFile(garbage, "This is no database. ".repeat(1_000));
    (await openFile(locked)).exec("CREATE TABLE other (id); BEGIN EXCLUSIVE");
    const faults = {
      [join(directory, "missing", "tasks.db")]: "unable to open database file",
      [directory]: "unable to open database file",
      [garbage]: "file is not a database",
      [locked]: "database is locked",
    };
    for (const [file, why] of Object.entries(faults)) {
      await assert.rejects(openTaskStore(`file:${file}`, () => {}), ({ message }: Error) => {
        assert.ok(message.startsWith(`DATABASE_URL: file:${file} cannot be used: ${why}`), message);
        return !message.includes("\n");
      });
    }
    const { lines, exited } = spawnServer(environment(1, `file:${garbage}`));
    assert.equal(await exited, 1);
    const [line = "", ...others] = lines.filter((line) => !/Warning|--trace-warnings/.test(line)); // Node 22's, of SQLite
    assert.ok(line.startsWith("DATABASE_URL: "), line);
    assert.deepEqual(others, []);
  });

  test("answers reads while another process holds it; writes wait a while, and then fail readably", async () => {
    const [port, file] = [await freePort(), newFile()];
    await startHere(port, `file:${file}`);
    const [user, reader] = [await newUser(port, "auth0|alice"), await newUser(port, "auth0|alice")];
    await user.create("before");
    const other = await openFile(file);

    other.exec("BEGIN IMMEDIATE");
    const short = user.create("while it is held for a moment");
    assert.deepEqual(await reader.titles(), ["before"]);
    other.exec("COMMIT");
    await short;

    other.exec("BEGIN IMMEDIATE");
    const calls = Promise.all([user.call("create_task", { title: "lost" }), health(port)]);
    assert.equal((await reader.titles()).length, 2);
    const [answer, status] = await calls;
    assertReadable(answer);
    assert.equal(status, 200); // which asks without writing
    other.exec("COMMIT");

    await user.create("after");
    assert.deepEqual(await user.titles(), ["after", "while it is held for a moment", "before"]);
  });

  const noLimits = (process.platform !== "linux" || "Deno" in globalThis) &&
    "a running process is given a limit on Linux only, and Deno dies of it";

  test(
    "loses nothing that was acknowledged while the disk is full",
    { skip: noLimits, timeout },
    async () => {
      const [port, file] = [await freePort(), newFile()];
      const server = await startProcess(port, `file:${file}`);
      const user = await newUser(port);
      const limitFiles = (bytes: string) => execFileSync("prlimit", [`--pid=${server.pid}`, `--fsize=${bytes}:`]);
      await user.create("before");
      const acknowledged = ["before"];

      limitFiles("100000"); // which the write-ahead log reaches after some twenty tasks
      for (let failures = 0; failures < 3;) {
        const title = randomUUID();
        const answer = await user.call("create_task", { title, notes: "x".repeat(4_000) });
        if (answer.data === undefined) assertReadable(answer);
        if (answer.data === undefined) failures++;
        else acknowledged.unshift(title);
      }
      assert.deepEqual(await user.titles(), acknowledged);

      limitFiles("unlimited");
      await user.create("after");
      acknowledged.unshift("after");

      server.kill("SIGKILL");
      await server.exited;
      await startHere(port, `file:${file}`);
      assert.deepEqual(await user.titles(), acknowledged);
    },
  );

  test("that is damaged gives tool errors that can be read, and harms no other call", async () => {
    const [port, file] = [await freePort(), newFile()];
    const user = await newUser(port);
    const store = await openTaskStore(`file:${file}`, () => {});
    for (const title of numbered(50)) {
      await store.create(user.subject, newTask({ title, notes: "x".repeat(4_000), due_at: null }));
    }
    await store.close();
    const handle = await open(file, "r+");
    const start = 10 * 4_096; // after the pages of the schema and the roots of its tables
    await handle.write(Buffer.alloc((await handle.stat()).size - start, "damage"), 0, undefined, start);
    await handle.close();

    await startHere(port, `file:${file}`);
    assertReadable(await user.call("list_tasks"));
    assert.deepEqual((await user.call("get_profile")).data, { id: user.subject });
  });
});

describe("a server", { timeout, concurrency: true }, () => {
  test(
    "and another on one file, one of them killed in the middle of a burst, lose no task and double none",
    onSqlite,
    async () => {
      const [ports, file] = [[await freePort(), await freePort()], newFile()];
      const [killedPort = 0, otherPort = 0] = ports;
      const start = () => startProcess(killedPort, `file:${file}`);
      // Both at once, before there is a file.
      const [killed] = await Promise.all([start(), startHere(otherPort, `file:${file}`)]);
      const users = await Promise.all([ports, ports, ports, ports].flat().map((port) => newUser(port, "auth0|alice")));
      const titles = numbered(60);
      let restarted: Promise<unknown> | undefined;
      const failures = await createAll(users, titles, (count) => {
        if (count !== 20) return;
        killed.kill("SIGKILL");
        restarted = killed.exited.then(start);
      });
      await restarted;
      assert.ok(failures.length > 0, "nothing failed: the server was killed too late");
      for (const user of users.slice(0, 2)) assert.deepEqual((await user.titles()).sort(), titles);
      const database = await openFile(file);
      assert.equal(database.prepare("PRAGMA integrity_check").get()?.integrity_check, "ok");
    },
  );

  test(
    "that is stopped and started again under load loses nothing",
    onSqlite,
    async () => {
      const [port, file] = [await freePort(), newFile()];
      const stopped = await startProcess(port, `file:${file}`);
      const users = await Promise.all(numbered(8).map(() => newUser(port, "auth0|alice")));
      const titles = numbered(60);
      let restarted: Promise<unknown> | undefined;
      const failures = await createAll(users, titles, (count) => {
        if (count !== 20) return;
        stopped.kill("SIGTERM");
        restarted = stopped.exited.then(() => startHere(port, `file:${file}`));
      });
      await restarted;
      assert.equal(await stopped.exited, 0);
      assert.ok(failures.length > 0, "nothing failed: the server was stopped too late");
      assert.deepEqual((await users[0]?.titles())?.sort(), titles);
    },
  );

  test("answers a call that is in flight when the stop comes", onSqlite, async () => {
    const [port, file] = [await freePort(), newFile()];
    const server = await startProcess(port, `file:${file}`);
    const [user, other] = [await newUser(port), await newUser(port)];
    await Promise.all([user.titles(), other.titles()]); // both are connected, so the next two calls come in order
    const lock = await openFile(file);
    lock.exec("BEGIN IMMEDIATE");
    const created = user.create("in flight");
    await other.titles();
    server.kill("SIGTERM");
    await until(() => server.lines.some((line) => line.endsWith("Stopping on SIGTERM")), "it says that it stops");
    lock.exec("COMMIT");
    assert.equal((await created).title, "in flight");
    assert.equal(await server.exited, 0);
  });

  test("makes whatever its store throws a tool error that can be read", async () => {
    const failure = new Error("SQL of /srv/tools.ts", { cause: new Error("secret") });
    const store: TaskStore = {
      list: () => {
        throw failure;
      },
      create: () => Promise.reject(failure),
      update: () => Promise.reject(undefined),
      delete: () => Promise.reject("SQL"),
      check: () => Promise.reject(failure),
      close: () => Promise.resolve(),
    };
    const port = await freePort();
    await startHere(port, "memory:", store);
    const user = await newUser(port);
    const id = randomUUID();
    assertReadable(await user.call("list_tasks"));
    assertReadable(await user.call("create_task", { title: "x" }));
    assertReadable(await user.call("update_task", { id }));
    assertReadable(await user.call("delete_task", { id }));
    assert.equal(await health(port), 503);
    assert.deepEqual((await user.call("get_profile")).data, { id: user.subject });
  });

  test("goes on when nobody reads its log any more", async () => {
    const port = await freePort();
    const server = await startProcess(port, "memory:");
    server.stderr.destroy();
    for (let logged = 0; logged < 3; logged++) assert.equal((await fetch(urlOf(port))).status, 401);
    assert.equal(await health(port), 200);
  });
});
