/**
 * `npm run soak -- [minutes]`, five unless said otherwise: mixed calls by many users at once, bad tokens, and clients
 * that disconnect in the middle of a request.
 *
 * server.ts runs as its own process. Every user knows their tasks and compares each answer with them; the first wrong
 * one ends the run. The exit status is 1 then, and where the server has logged a fault of its own, or its memory has
 * grown by a fifth between the third and the last fifth of the run.
 */
import assert from "node:assert/strict";
import { randomInt, randomUUID } from "node:crypto";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Task } from "../../../tools.ts";
import { runtime, toRequest, usageOf } from "./load.ts";
import { Connection, freePort, noSqlite, spawnServer } from "../../support/server.ts";
import { startTenant } from "../../support/tenant.ts";

const USERS = 32;
const MAX_TASKS = 25; // each, so that the store does not grow with the run
const TOKEN_SECONDS = 60; // short, so that tokens expire while the server remembers them
const MAX_GROWTH = 1.2;

/** Makes one call at a time, so that its own list of its tasks is exact. */
interface User {
  subject: string;
  connection: Connection;
  token: string;
  /** In milliseconds since 1970. */
  renewTokenAt: number;
  /** Newest first. */
  tasks: Task[];
}

/** The structured content of all tools' results: each tool gives some of these. */
type Structured = { id: string; task: Task; tasks: Task[]; next_cursor?: string; deleted: string };

const minutes = Number(process.argv[2] ?? 5);
const directory = await mkdtemp(join(tmpdir(), "soak-"));
const tenant = await startTenant();
const port = await freePort();
const aud = `http://localhost:${port}/mcp`;
const badTokens = [
  await tenant.sign({ aud, exp: 1_000_000_000 }),
  await tenant.sign({ aud: `${aud}/` }),
  await tenant.sign({ aud, iss: tenant.origin }),
  await tenant.sign({ aud, sub: undefined }),
  `${await tenant.sign({ aud })}x`,
  "opaque",
  "a.token.of.five.parts",
];
let done = 0;
const memory: number[] = [];

const actions = {
  async list(user: User) {
    const limit = randomInt(1, MAX_TASKS);
    const found: Task[] = [];
    let cursor: string | undefined;
    do {
      const page = await call(user, "list_tasks", { limit, cursor });
      found.push(...page.tasks);
      cursor = page.next_cursor;
    } while (cursor !== undefined);
    assert.deepEqual(found, user.tasks);
  },

  async listByStatus(user: User) {
    const status = pick(["todo", "in_progress", "done"]);
    const { tasks } = await call(user, "list_tasks", { status, limit: MAX_TASKS });
    assert.deepEqual(tasks, user.tasks.filter((task) => task.status === status));
  },

  async create(user: User) {
    const due_at = pick([null, "2027-01-01T00:00:00.000Z"]);
    await create(user, { title: `Task ${randomUUID()}`, notes: pick([null, "Grüße ✓"]), due_at });
  },

  /** As a model does after a lost reply. */
  async createTwice(user: User) {
    const input = { title: "Once", idempotency_key: randomUUID() };
    const task = await create(user, input);
    assert.deepEqual(await call(user, "create_task", input), { task });
  },

  /** As a client does that disconnected before the reply. */
  async createUnheard(user: User) {
    const input = { title: "Unheard", idempotency_key: randomUUID() };
    const connection = new Connection(port);
    await connection.send(toRequest(user.token, "ping")); // or else the second call could overtake the first one
    const request = toRequest(user.token, "tools/call", { name: "create_task", arguments: input });
    await connection.leave(request, pick(["end", "reset"]));
    await create(user, input);
  },

  async update(user: User) {
    const task = pick(user.tasks);
    const changes = pick([{ status: "done" }, { status: "in_progress" }, { title: "New", notes: null }]);
    const { task: updated } = await call(user, "update_task", { id: task.id, ...changes });
    assert.deepEqual(updated, { ...task, ...changes, updated_at: updated.updated_at });
    user.tasks = user.tasks.map((other) => other === task ? updated : other);
  },

  async delete(user: User) {
    const { id } = pick(user.tasks);
    assert.deepEqual(await call(user, "delete_task", { id }), { deleted: id });
    user.tasks = user.tasks.filter((task) => task.id !== id);
  },

  async touchAnothers(user: User) {
    const { tasks: [theirs] } = pick(users.filter((other) => other !== user));
    const input = { id: theirs?.id ?? randomUUID(), title: "Mine" };
    const text = await fail(user, pick(["update_task", "delete_task"]), input);
    assert.match(text, /^id: no task has the id/);
  },

  async sendNonsense(user: User) {
    const [name, input, expected] = pick<[string, Record<string, unknown>, RegExp]>([
      ["create_task", { title: "" }, /^title: .+ It takes \{/],
      ["create_task", { title: "half \ud83d" }, /^title: /],
      ["create_task", { title: "x".repeat(201) }, /^title: /],
      ["list_tasks", { cursor: "yesterday" }, /^cursor: /],
      ["list_tasks", { limit: 101 }, /^limit: /],
      ["update_task", { id: "1", title: "x" }, /^id: no task has the id 1\b/],
      ["update_task", { id: "1", completed: true }, /^Nothing to change/],
      ["destroy_everything", {}, /^There is no tool destroy_everything\b/],
    ]);
    assert.match(await fail(user, name, input), expected);
  },

  async sendBadToken(user: User) {
    const { status, head } = await user.connection.send(toRequest(pick(badTokens), "tools/list"));
    assert.equal(status, 401);
    assert.match(head, /WWW-Authenticate: Bearer error="invalid_token", error_description="[^"]+", resource_metadata=/);
  },

  /** In the middle of a request. */
  async leave(user: User) {
    const request = toRequest(user.token, "tools/call", { name: "create_task", arguments: { title: "Never" } });
    const part = request.subarray(0, randomInt(1, request.length));
    await new Connection(port).leave(part, pick(["end", "reset"]));
  },

  async getProfile(user: User) {
    assert.deepEqual(await call(user, "get_profile", {}), { id: user.subject });
  },
};

const DATABASE_URL = noSqlite ? "memory:" : `file:${join(directory, "soak.db")}`;
const server = spawnServer({ AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: aud, PORT: String(port), DATABASE_URL });
await server.ready;
const users = Array.from({ length: USERS }, (_, index): User => {
  return { subject: `auth0|user-${index}`, connection: new Connection(port), token: "", renewTokenAt: 0, tasks: [] };
});
const sampling = setInterval(() => memory.push(usageOf(server.pid).rss), 1_000);
try {
  console.log(`${runtime}, ${USERS} users for ${minutes} minutes, tasks in ${noSqlite ? "memory" : "SQLite"}`);
  const end = Date.now() + minutes * 60_000;
  await Promise.all(users.map((user) => live(user, end)));
} finally {
  clearInterval(sampling);
  for (const { connection } of users) connection.close();
  server.kill("SIGTERM");
  await server.exited;
  await tenant.close();
  await rm(directory, { recursive: true });
}
report();

async function live(user: User, end: number) {
  while (Date.now() < end) {
    if (Date.now() > user.renewTokenAt) {
      const exp = Math.floor(Date.now() / 1_000) + TOKEN_SECONDS;
      user.token = await tenant.sign({ sub: user.subject, aud, exp });
      user.renewTokenAt = (exp - 10) * 1_000;
    }
    if (user.tasks.length === 0) await actions.create(user);
    else if (user.tasks.length >= MAX_TASKS) await actions.delete(user);
    else await pick(Object.values(actions))(user);
    done++;
  }
}

async function create(user: User, input: Partial<Task> & { idempotency_key?: string }): Promise<Task> {
  const { idempotency_key: _, ...fields } = input;
  const { task } = await call(user, "create_task", input);
  const { id, created_at, updated_at } = task;
  assert.deepEqual(task, { id, created_at, updated_at, status: "todo", notes: null, due_at: null, ...fields });
  user.tasks = [task, ...user.tasks].sort((a, b) => a.created_at + a.id < b.created_at + b.id ? 1 : -1);
  return task;
}

/** Calls a tool that must succeed. */
async function call(user: User, name: string, input: Record<string, unknown>): Promise<Structured> {
  const { isError, content, structuredContent } = await callTool(user, name, input);
  assert.ok(!isError, `${name}: ${content[0].text}`);
  assert.deepEqual(JSON.parse(content[0].text), structuredContent);
  return structuredContent;
}

/** Calls a tool that must refuse, and gives its text. */
async function fail(user: User, name: string, input: Record<string, unknown>): Promise<string> {
  const { isError, content } = await callTool(user, name, input);
  assert.ok(isError, `${name} took ${JSON.stringify(input)}`);
  return content[0].text;
}

async function callTool({ connection, token }: User, name: string, input: Record<string, unknown>) {
  const reply = await connection.send(toRequest(token, "tools/call", { name, arguments: input }));
  assert.equal(reply.status, 200, `${name}: ${reply.body}`);
  return JSON.parse(String(reply.body)).result;
}

function pick<T>(items: readonly T[]): T {
  const item = items[randomInt(items.length)];
  assert.ok(item !== undefined);
  return item;
}

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
}

function report() {
  console.log(`${done.toLocaleString("en")} actions, every answer right`);
  const faults = server.lines.filter((line) => /Unexpected|failed| 500 | 503 /.test(line));
  console.log(`${server.lines.length} lines in the log, ${faults.length} of them faults`);
  for (const line of faults.slice(0, 10)) console.log(`  ${line}`);

  const fifth = Math.floor(memory.length / 5);
  const [early, late] = [median(memory.slice(2 * fifth, 3 * fifth)), median(memory.slice(-fifth))];
  const isFlat = !(late > early * MAX_GROWTH); // NaN where there is no /proc
  const [before, after] = [early, late].map((bytes) => `${Math.round(bytes / 1e6)} MB`);
  console.log(`memory ${before} in the third fifth, ${after} in the last: ${isFlat ? "flat" : "GROWN"}`);
  process.exitCode = isFlat && faults.length === 0 ? 0 : 1;
}
