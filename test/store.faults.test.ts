/** Faults of a store's file, and stops and restarts of the server, mostly as a process of its own. */
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { randomUUID } from "node:crypto";
import { chmod, mkdir, mkdtemp, open, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import { newTask, openTaskStore, type Task } from "../tools.ts";
import { noPostgres, type Postgres, startPostgres } from "./support/postgres.ts";
import { freePort, noSqlite, post, type ServerProcess, spawnServer, startServer, until } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";

/** In milliseconds, since most faults would make a test wait for ever. */
const timeout = 60_000;
const onSqlite = { skip: noSqlite, timeout };

const tenant = await startTenant();
const directory = await mkdtemp(join(tmpdir(), "faults-"));
await chmod(directory, 0o755); // for asNobody
let postgres: Postgres;

before(async () => {
  if (noPostgres === false) postgres = await startPostgres();
});

/** Closes what tests have started and opened. Inside `describe`, Deno 2 does not run `t.after`. */
const closing: (() => unknown)[] = [];

after(async () => {
  for (const close of closing.toReversed()) await close();
  await tenant.close();
  await postgres?.close();
  await rm(directory, { recursive: true });
});

const newFile = () => join(directory, `${randomUUID()}.db`);

/** Another connection to the file than the server's. */
async function connectTo(file: string) {
  const { DatabaseSync } = await import("node:sqlite");
  const database = new DatabaseSync(file);
  closing.push(() => database.close());
  return database;
}

const urlOf = (port: number) => `http://127.0.0.1:${port}/mcp`;

function environment(port: number, databaseUrl: string): Record<string, string> {
  const settings = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: urlOf(port), PORT: String(port) };
  return { ...settings, DATABASE_URL: databaseUrl };
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

/** In the process of the test. */
async function startInProcess(port: number, databaseUrl: string) {
  closing.push((await startServer(environment(port, databaseUrl))).close);
}

interface Answer {
  text: string;
  /** Undefined in a tool error. */
  data: { task: Task; tasks: Task[] } | undefined;
}

/** A user of the server on a port. A call rejects when it gets no reply. */
async function newUser(port: number, subject = `auth0|${randomUUID()}`) {
  const token = await tenant.sign({ aud: urlOf(port), sub: subject });

  async function call(name: string, input: object = {}): Promise<Answer> {
    const reply = await post(urlOf(port), token, "tools/call", { name, arguments: input });
    const { isError, content: [{ text }], structuredContent } = (await reply.json()).result;
    return { text, data: isError ? undefined : structuredContent };
  }

  return {
    subject,
    call,
    async create(title: string, idempotency_key: string = randomUUID()): Promise<Task> {
      const { text, data } = await call("create_task", { title, idempotency_key });
      return data?.task ?? assert.fail(text);
    },
    /** In alphabetical order. */
    async titles(): Promise<string[]> {
      const { text, data } = await call("list_tasks", { limit: 100 });
      return data?.tasks.map(({ title }) => title).sort() ?? assert.fail(text);
    },
  };
}

type User = Awaited<ReturnType<typeof newUser>>;

/** Creates a task for each title, trying again after failures. Gives how many calls failed. */
async function createAll(users: User[], titles: string[], onCreated: (count: number) => void): Promise<number> {
  const left = [...titles];
  let [created, failures] = [0, 0];
  await Promise.all(users.map(async (user) => {
    for (let title = left.pop(); title !== undefined; title = left.pop()) {
      try {
        await user.create(title, title);
        onCreated(++created);
      } catch {
        failures++;
        left.push(title);
        await delay(20); // as a client waits before it tries again
      }
    }
  }));
  return failures;
}

const numbered = (count: number) => Array.from({ length: count }, (_, index) => String(index).padStart(3, "0"));

const health = async (port: number) => (await fetch(`http://127.0.0.1:${port}/health`)).status;

/** A tool error that says what to do, without internal details. */
function assertReadable({ text, data }: Answer) {
  assert.equal(data, undefined);
  assert.match(text, /^\w+ failed, and the server's log says why\. Try again/);
  assert.doesNotMatch(text, /SQL|database|Error|\n|\.ts/i);
}

/** Runs as another user where the test runs as root, who may write anywhere. */
async function asNobody<T>(work: () => Promise<T>): Promise<T> {
  if (process.getuid?.() !== 0) return await work();
  process.seteuid?.(65_534);
  try {
    return await work();
  } finally {
    process.seteuid?.(0);
  }
}

test("a folder or a file that cannot be written to stops the start", onSqlite, async () => {
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

describe("faults of a store's file", { ...onSqlite, concurrency: true }, () => {
  test("a file that is no database, locked or out of reach stops the start, with one line that says why", async () => {
    const [garbage, locked] = [newFile(), newFile()];
    await writeFile(garbage, "This is no database. ".repeat(1_000));
    (await connectTo(locked)).exec("CREATE TABLE other (id); BEGIN EXCLUSIVE");
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
    const [line = "", ...others] = lines.filter((line) => !/Warning|--trace-warnings/.test(line)); // of Node 22
    assert.ok(line.startsWith("DATABASE_URL: "), line);
    assert.deepEqual(others, []);
  });

  test("while another process writes to the file, reads are answered, and writes wait, then fail", async () => {
    const [port, file] = [await freePort(), newFile()];
    await startInProcess(port, `file:${file}`);
    const user = await newUser(port);
    await user.create("a");
    const other = await connectTo(file);

    other.exec("BEGIN IMMEDIATE");
    const short = user.create("b, while it is held for a moment");
    assert.deepEqual(await user.titles(), ["a"]);
    other.exec("COMMIT");
    await short;

    other.exec("BEGIN IMMEDIATE");
    const calls = Promise.all([user.call("create_task", { title: "lost" }), health(port)]);
    assert.equal((await user.titles()).length, 2);
    const [answer, status] = await calls;
    assertReadable(answer);
    assert.equal(status, 200); // its query does not write
    other.exec("COMMIT");

    await user.create("c");
    assert.deepEqual(await user.titles(), ["a", "b, while it is held for a moment", "c"]);
  });

  const noLimits = (process.platform !== "linux" || "Deno" in globalThis) &&
    "a running process is given a limit on Linux only, and Deno dies of it";

  test("a full disk loses nothing that was acknowledged", { skip: noLimits, timeout }, async () => {
    const [port, file] = [await freePort(), newFile()];
    const server = await startProcess(port, `file:${file}`);
    const user = await newUser(port);
    const limitFiles = (bytes: string) => execFileSync("prlimit", [`--pid=${server.pid}`, `--fsize=${bytes}:`]);
    const acknowledged = [(await user.create("before")).title];

    limitFiles("100000"); // which the write-ahead log reaches after some twenty tasks
    for (let failures = 0; failures < 3;) {
      const title = randomUUID();
      const answer = await user.call("create_task", { title, notes: "x".repeat(2_000) });
      if (answer.data === undefined) assertReadable(answer);
      if (answer.data === undefined) failures++;
      else acknowledged.push(title);
    }
    assert.deepEqual(await user.titles(), acknowledged.sort());

    limitFiles("unlimited");
    acknowledged.push((await user.create("after")).title);

    server.kill("SIGKILL");
    await server.exited;
    await startInProcess(port, `file:${file}`);
    assert.deepEqual(await user.titles(), acknowledged.sort());
  });

  test("a damaged file gives readable tool errors, and calls that do not need it are answered", async () => {
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

    await startInProcess(port, `file:${file}`);
    assertReadable(await user.call("list_tasks"));
    assert.deepEqual((await user.call("get_profile")).data, { id: user.subject });
  });
});

describe("stop and restart", { timeout, concurrency: true }, () => {
  const crash = async (port: number) => {
    await postgres.kill();
    assert.equal(await health(port), 503);
    await postgres.start();
  };
  const cases = [
    { what: "killed", signal: "SIGKILL", status: "SIGKILL", skip: noSqlite, crash: undefined },
    { what: "stopped", signal: "SIGTERM", status: 0, skip: noSqlite, crash: undefined },
    { what: "killed after its PostgreSQL crashed", signal: "SIGKILL", status: "SIGKILL", skip: noPostgres, crash },
  ] as const;
  for (const { what, signal, status, skip, crash } of cases) {
    test(
      `no task is lost or doubled where one of two servers is ${what} in the middle of a burst`,
      { skip, timeout },
      async () => {
        const [port, standingPort] = [await freePort(), await freePort()];
        const url = crash ? await postgres.newDatabase() : `file:${newFile()}`;
        // Both at once, before there are tables.
        const [server] = await Promise.all([startProcess(port, url), startInProcess(standingPort, url)]);
        const ports = numbered(8).map((_, index) => index % 2 === 0 ? port : standingPort);
        const users = await Promise.all(ports.map((port) => newUser(port, "auth0|alice")));
        const titles = numbered(60);
        let restarted: Promise<unknown> | undefined;
        async function restart() {
          await crash?.(standingPort);
          server.kill(signal);
          assert.equal(await server.exited, status);
          await startProcess(port, url);
        }
        // Each task is created twice, as by a client that has lost the first reply.
        const failures = await createAll(users, [...titles, ...titles], (count) => {
          if (count === 20) restarted = restart();
        });
        await restarted;
        assert.ok(failures > 0, "nothing failed: the fault came too late");
        for (const user of users.slice(0, 2)) assert.deepEqual(await user.titles(), titles);
      },
    );
  }

  test("a call that is in flight when the server is stopped is answered", onSqlite, async () => {
    const [port, file] = [await freePort(), newFile()];
    const server = await startProcess(port, `file:${file}`);
    const user = await newUser(port);
    await Promise.all([user.titles(), user.titles()]); // two connections, so that the next two calls come in order
    const lock = await connectTo(file);
    lock.exec("BEGIN IMMEDIATE");
    const created = user.create("in flight");
    await user.titles();
    server.kill("SIGTERM");
    await until(() => server.lines.some((line) => line.endsWith("Stopping on SIGTERM")), "it says that it stops");
    lock.exec("COMMIT");
    assert.equal((await created).title, "in flight");
    assert.equal(await server.exited, 0);
  });

  test("a server goes on after its log's reader has closed the pipe", async () => {
    const port = await freePort();
    const server = await startProcess(port, "memory:");
    server.stderr.destroy();
    for (let logged = 0; logged < 3; logged++) assert.equal((await fetch(urlOf(port))).status, 401);
    assert.equal(await health(port), 200);
  });
});
