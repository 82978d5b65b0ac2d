/**
 * What the user may do, and with whose tasks: the tools, and the store behind them.
 *
 * Knows a `Caller`, and nothing of HTTP. Every query is bound to the caller's subject. To make the template
 * yours, replace the task schema, the tools and the SQL in this file; server.ts and auth.ts stay as they are.
 */
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
// @ts-types="@modelcontextprotocol/sdk/inMemory"
import { InMemoryTransport } from "@modelcontextprotocol/sdk/inMemory.js";
// @ts-types="@modelcontextprotocol/sdk/server/mcp"
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import { ListToolsRequestSchema, ListToolsResultSchema } from "@modelcontextprotocol/sdk/types.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import type { CallToolResult, ListToolsResult, ToolAnnotations } from "@modelcontextprotocol/sdk/types.js";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/sdk/validation/ajv";
import { z } from "zod";
import { challenge, reason } from "./auth.ts";
import type { Caller } from "./auth.ts";

// ---------------------------------------------------------------------------------------------- schemas
// Made once, here: a schema made for every request would cost more than the request.

const status = z.enum(["todo", "in_progress", "done"]);
const title = z.string().trim().min(1).max(200).regex(/^[^\0]*$/).describe("What to do, in the user's words");
const notes = z.string().max(4000).regex(/^[^\0]*$/).nullish().describe("Details; null for none");
const dueAt = z.iso.datetime({ offset: true }).nullish()
  .describe("When it is due, ISO 8601 with a time zone such as 2026-12-01T09:00:00+01:00; null for no date");
const id = z.uuid().describe("The id of a task, from list_tasks or create_task");

const task = z.object({
  id: z.string(),
  title: z.string(),
  notes: z.string().nullable(),
  status,
  due_at: z.string().nullable(),
  created_at: z.string(),
  updated_at: z.string(),
});
export type Task = z.infer<typeof task>;

const MAX_TASKS = 1_000;

// ------------------------------------------------------------------------------------------------ tools

/** What a tool works with: who calls, and where tasks are kept. */
interface Context {
  caller: Caller;
  store: TaskStore;
}

interface Tool {
  name: string;
  /** Needed where ENFORCE_SCOPES is on; a tool without one is open to every signed-in user. */
  scope?: "tasks:read" | "tasks:write";
  title: string;
  /** For the model that has to choose: when to use the tool, and when another one. */
  description: string;
  inputSchema: z.ZodObject;
  outputSchema: z.ZodObject;
  annotations: Required<Omit<ToolAnnotations, "title">>;
  _meta: Record<string, unknown>;
  run(input: Record<string, unknown>, context: Context): Promise<Result<Record<string, unknown>>>;
}

interface Result<Structured> {
  /** A short sentence; the data is in `structuredContent`. */
  text: string;
  structuredContent: Structured;
}

/** Ties what `run` takes and gives to the two schemas, so that the compiler sees a tool break its own promise. */
function defineTool<Input extends z.ZodObject, Output extends z.ZodObject>(
  tool: Omit<Tool, "inputSchema" | "outputSchema" | "run"> & {
    inputSchema: Input;
    outputSchema: Output;
    run(input: z.output<Input>, context: Context): Promise<Result<z.output<Output>>>;
  },
): Tool {
  return tool;
}

/** A refusal that the model can act on: its message becomes the text of a tool error. */
class ToolError extends Error {}

const unknownTask = (id: string) =>
  new ToolError(`id: no task has the id ${id}. Call list_tasks for those there are`);

const progress = (invoking: string, invoked: string) => ({
  "openai/toolInvocation/invoking": invoking,
  "openai/toolInvocation/invoked": invoked,
});

const tools: Tool[] = [
  defineTool({
    name: "get_profile",
    title: "Get my profile",
    description: "Use this to learn which account is signed in. Not for tasks.",
    inputSchema: z.object({}),
    outputSchema: z.object({
      id: z.string(),
      name: z.string().optional(),
      email: z.string().optional(),
      nickname: z.string().optional(),
    }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    // ChatGPT calls the tool with this mark to tell linked accounts apart, and wants these four fields at most.
    _meta: { "openai/profile": true, ...progress("Looking up your profile", "Profile found") },
    run: (_, { caller: { subject, profile } }) =>
      Promise.resolve({
        text: `Signed in as ${profile.name ?? subject}`,
        structuredContent: { id: subject, ...profile },
      }),
  }),

  defineTool({
    name: "list_tasks",
    scope: "tasks:read",
    title: "List tasks",
    description:
      "Use this when the user asks what there is to do, and to find the id of a task before changing it. " +
      "Newest first; pass next_cursor as cursor for the next page.",
    inputSchema: z.object({
      status: status.optional().describe("Only tasks with this status"),
      limit: z.int().min(1).max(100).default(50).describe("How many at most"),
      cursor: z.iso.datetime().optional().describe("next_cursor of the page before"),
    }),
    outputSchema: z.object({ tasks: z.array(task), next_cursor: z.string().optional() }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    _meta: progress("Reading your tasks", "Tasks read"),
    async run({ status, limit, cursor }, { caller, store }) {
      // One more than asked for tells whether there is a next page. A page starts after the last task of the
      // one before, whose time of creation never changes: tasks added or deleted meanwhile shift nothing.
      const before = cursor === undefined ? Number.MAX_SAFE_INTEGER : Date.parse(cursor);
      const found = await store.list(caller.subject, { status, before, limit: limit + 1 });
      const tasks = found.slice(0, limit);
      const more = found.length > limit ? { next_cursor: tasks.at(-1)?.created_at } : {};
      return {
        text: `${tasks.length} tasks${found.length > limit ? ", and there are more" : ""}`,
        structuredContent: { tasks, ...more },
      };
    },
  }),

  defineTool({
    name: "create_task",
    scope: "tasks:write",
    title: "Create a task",
    description:
      "Use this when the user wants to remember or plan something new. Not for changing a task: see update_task.",
    inputSchema: z.object({
      title,
      notes,
      due_at: dueAt,
      // A model may repeat a call whose reply it lost; the key makes the second one harmless.
      idempotency_key: z.string().min(1).max(200).regex(/^[^\0]*$/).optional()
        .describe("Any string made up for this task: calling again with it gives the same task back"),
    }),
    outputSchema: z.object({ task }),
    annotations: { readOnlyHint: false, destructiveHint: false, idempotentHint: false, openWorldHint: false },
    _meta: progress("Writing the task down", "Task created"),
    async run({ title, notes, due_at, idempotency_key }, { caller, store }) {
      // The owner comes from the token, never from the input.
      const created = await store.create(caller.subject, {
        title,
        notes: notes ?? null,
        due_at: toUtc(due_at),
      }, idempotency_key);
      if (created === undefined) {
        throw new ToolError(
          `There are ${MAX_TASKS} tasks already, the most a user can have. Delete some with delete_task first`,
        );
      }
      return { text: `Created: ${created.title}`, structuredContent: { task: created } };
    },
  }),

  defineTool({
    name: "update_task",
    scope: "tasks:write",
    title: "Change a task",
    description: "Use this to rename, reschedule, annotate, start, finish or reopen a task that exists. " +
      "Fields that are left out stay as they are.",
    inputSchema: z.object({ id, title: title.optional(), notes, due_at: dueAt, status: status.optional() }),
    outputSchema: z.object({ task }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    _meta: progress("Changing the task", "Task changed"),
    async run({ id, due_at, ...changes }, { caller, store }) {
      const updated = await store.update(
        caller.subject,
        id,
        due_at === undefined ? changes : { ...changes, due_at: toUtc(due_at) },
      );
      if (updated === undefined) throw unknownTask(id);
      return { text: `Changed: ${updated.title} (${updated.status})`, structuredContent: { task: updated } };
    },
  }),

  defineTool({
    name: "delete_task",
    scope: "tasks:write",
    title: "Delete a task",
    description:
      "Use this only when the user wants a task gone for good. For a finished one, set its status with update_task.",
    inputSchema: z.object({ id }),
    outputSchema: z.object({ deleted: z.string() }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    _meta: progress("Deleting the task", "Task deleted"),
    async run({ id }, { caller, store }) {
      if (!await store.delete(caller.subject, id)) throw unknownTask(id);
      return { text: "Deleted", structuredContent: { deleted: id } };
    },
  }),
];

function toUtc(time: string | null | undefined): string | null {
  return typeof time === "string" ? new Date(time).toISOString() : null;
}

// ------------------------------------------------------------------------------------------- MCP server

export interface ToolSettings {
  /** MCP_SERVER_URL, for the challenge of a refusal. */
  resource: string;
  enforceScopes: boolean;
  /** Takes a line for the operator when a tool fails for a reason that is not the caller's. */
  warn: (line: string) => void;
}

/** Makes the server for one request. `names` are the tools that it calls: no others need registering. */
export type McpServerFactory = (caller: Caller, store: TaskStore, names: readonly string[]) => McpServer;

// `offline_access` stands in every list: without it clients ask for no refresh token, and users have to sign
// in again every day. Left to themselves ChatGPT and the SDK's clients ask for the union of these lists.
const SIGN_IN_SCOPES = ["openid", "profile", "email", "offline_access"];

/** What a client should ask for: with ENFORCE_SCOPES the API's permissions, since Auth0 grants no others for it. */
export function requestedScopes({ enforceScopes }: Pick<ToolSettings, "enforceScopes">): string[] {
  const needed = new Set(tools.flatMap(({ scope }) => scope ?? []));
  return enforceScopes ? [...needed, "offline_access"] : SIGN_IN_SCOPES;
}

/**
 * Prepares all that is the same for every request, and gives back what makes the server of a single one.
 *
 * A server shared between clients would hand one's answers to another (SDK advisory, fixed in 1.26).
 */
export function createMcpServerFactory(settings: ToolSettings): McpServerFactory {
  const info = { name: "tasks", title: "Tasks", version: "1.0.0" };
  const options = {
    capabilities: { tools: { listChanged: true } },
    instructions: "Each signed-in user's own task list.",
    jsonSchemaValidator: new AjvJsonSchemaValidator(),
  };
  const configured = new Map(tools.map((tool) => [tool.name, { tool, config: toConfig(tool, settings) }]));
  let list: Promise<ListToolsResult> | undefined;

  function create(context: Context, names: Iterable<string>): McpServer {
    const server = new McpServer(info, options);
    for (const name of new Set(names)) {
      const known = configured.get(name); // an unknown tool is the SDK's to refuse
      if (known !== undefined) {
        server.registerTool(name, known.config, (input) => call(known.tool, input, context, settings));
      }
    }
    return server;
  }

  return (caller, store, names) => {
    const context = { caller, store };
    const server = create(context, names);
    // The list is the same for everybody, and the SDK would convert every schema anew for each request.
    server.server.setRequestHandler(
      ListToolsRequestSchema,
      () => list ??= listTools(create(context, configured.keys())),
    );
    return server;
  };
}

/** What the SDK registers: the tool, and the scopes that a client has to ask for before it can call it. */
function toConfig({ name: _, scope, run: __, ...config }: Tool, { enforceScopes }: ToolSettings) {
  const scopes = enforceScopes ? [...(scope === undefined ? [] : [scope]), "offline_access"] : SIGN_IN_SCOPES;
  // ChatGPT reads securitySchemes from `_meta` too, which is where SDK v1 leaves it.
  return { ...config, _meta: { securitySchemes: [{ type: "oauth2", scopes }], ...config._meta } };
}

/** Asks a server for its list of tools, as a client would. */
async function listTools(server: McpServer): Promise<ListToolsResult> {
  const [client, transport] = InMemoryTransport.createLinkedPair();
  await server.connect(transport);
  const reply = new Promise((resolve) => client.onmessage = resolve);
  await client.send({ jsonrpc: "2.0", id: 1, method: "tools/list" });
  const { result } = z.object({ result: ListToolsResultSchema }).parse(await reply);
  await server.close();
  return result;
}

/** Runs a tool. Whatever goes wrong is a tool error that the model can read, never an exception. */
async function call(
  tool: Tool,
  input: Record<string, unknown>,
  context: Context,
  settings: ToolSettings,
): Promise<CallToolResult> {
  const { scope } = tool;
  if (settings.enforceScopes && scope !== undefined && !context.caller.scopes.has(scope)) {
    return insufficientScope(scope, settings);
  }
  try {
    const { text, structuredContent } = await tool.run(input, context);
    return { content: [{ type: "text", text }], structuredContent };
  } catch (error) {
    if (error instanceof ToolError) return toolError(error.message);
    settings.warn(`${tool.name} failed: ${reason(error)}`);
    return toolError(
      "The tasks cannot be reached right now. Try again in a minute; a change may have been made or not, so " +
        "look with list_tasks first",
    );
  }
}

function toolError(text: string): CallToolResult {
  return { isError: true, content: [{ type: "text", text }] };
}

/**
 * The refusal in the form that ChatGPT documents: it then offers to sign in again for what is missing. The
 * challenge asks for all scopes at once, since a client that asks for one alone would lose the others.
 */
function insufficientScope(scope: string, settings: ToolSettings): CallToolResult {
  const description =
    `This tool needs the permission ${scope}, which the token does not grant: README, Permissions per tool`;
  const header = challenge(settings.resource, {
    error: "insufficient_scope",
    error_description: description,
    scope: requestedScopes(settings).join(" "),
  });
  return { ...toolError(description), _meta: { "mcp/www_authenticate": [header] } };
}

// ------------------------------------------------------------------------------------------------ store

/** What a user gives for a new task; `due_at` in UTC. */
type NewTask = Pick<Task, "title" | "notes" | "due_at">;
/** Fields left out, or undefined, stay as they are. */
type Changes = { [Field in keyof NewTask | "status"]?: Task[Field] | undefined };

/**
 * Where tasks live. Every call names the owner, and reaches no others' tasks. A write that has returned
 * survives the end of the process. Failures of the database are thrown as they come.
 */
export interface TaskStore {
  /** The newest `limit` tasks created before `before` (milliseconds since 1970), newest first. */
  list(
    owner: string,
    page: { status?: Task["status"] | undefined; before: number; limit: number },
  ): Promise<Task[]>;
  /** The new task, or the one that the same key made before; undefined when the owner has MAX_TASKS. */
  create(owner: string, task: NewTask, idempotencyKey?: string): Promise<Task | undefined>;
  /** The changed task; undefined when the owner has none with this id. */
  update(owner: string, id: string, changes: Changes): Promise<Task | undefined>;
  /** Whether there was such a task. */
  delete(owner: string, id: string): Promise<boolean>;
  /** Throws when the store cannot take a write now. */
  check(): Promise<void>;
  close(): Promise<void>;
}

/**
 * Opens the store that DATABASE_URL names.
 *
 * @param url `file:<path>`, `memory:` or `postgres://…`; undefined for `file:tasks.db` where the runtime has
 *   SQLite, else memory and a warning.
 * @throws {Error} A line for the operator, when what was asked for cannot be had.
 */
export async function openTaskStore(
  url: string | undefined,
  warn: (line: string) => void,
): Promise<TaskStore> {
  const asked = url ?? "file:tasks.db";
  if (asked === "memory:") return new MemoryStore();
  const isPostgres = /^postgres(ql)?:/.test(asked);
  try {
    const store = new SqlStore(await (isPostgres ? openPostgres(asked) : openSqlite(asked)));
    await store.check(); // a database that can only be read should stop the start, not the first user
    return store;
  } catch (error) {
    if (url === undefined && error instanceof NoSqlite) {
      warn(`${error.message}: tasks are kept in memory, and lost when the server stops`);
      return new MemoryStore();
    }
    // A postgres URL holds a password: it is not repeated.
    throw new Error(`DATABASE_URL: ${isPostgres ? "PostgreSQL" : asked} cannot be used: ${reason(error)}`, {
      cause: error,
    });
  }
}

/** For tests, and for runtimes without SQLite. */
class MemoryStore implements TaskStore {
  readonly #entries = new Map<string, { task: Task; key: string | undefined }[]>(); // each owner's, newest first

  #of(owner: string) {
    return this.#entries.get(owner) ?? [];
  }

  list(owner: string, { status, before, limit }: Parameters<TaskStore["list"]>[1]) {
    const tasks = this.#of(owner).map(({ task }) => task);
    const found = tasks.filter((task) =>
      (status ?? task.status) === task.status && Date.parse(task.created_at) < before
    );
    return Promise.resolve(found.slice(0, limit));
  }

  create(owner: string, fields: NewTask, key?: string) {
    const entries = this.#of(owner);
    const known = entries.find((entry) => key !== undefined && entry.key === key);
    if (known !== undefined || entries.length >= MAX_TASKS) return Promise.resolve(known?.task);
    const newest = entries[0] === undefined ? 0 : Date.parse(entries[0].task.created_at);
    const now = new Date(Math.max(Date.now(), newest + 1)).toISOString();
    const task: Task = { id: randomUUID(), ...fields, status: "todo", created_at: now, updated_at: now };
    this.#entries.set(owner, [{ task, key }, ...entries]);
    return Promise.resolve(task);
  }

  update(owner: string, id: string, changes: Changes) {
    const entry = this.#of(owner).find(({ task }) => task.id === id);
    if (entry === undefined) return Promise.resolve(undefined);
    const given = Object.fromEntries(Object.entries(changes).filter(([, value]) => value !== undefined));
    entry.task = { ...entry.task, ...given, updated_at: new Date().toISOString() };
    return Promise.resolve(entry.task);
  }

  delete(owner: string, id: string) {
    const entries = this.#of(owner);
    const left = entries.filter(({ task }) => task.id !== id);
    this.#entries.set(owner, left);
    return Promise.resolve(left.length < entries.length);
  }

  check = () => Promise.resolve();
  close = () => Promise.resolve();
}

type Value = string | number | null;

/** A database that takes `$1`, `$2`… for bound values: what SQLite and PostgreSQL have to differ in. */
interface Database {
  query(sql: string, values: Value[]): Promise<Record<string, unknown>[]>;
  /** For FROM: `count` and `newest` of the tasks of owner `$1`, which no other statement adds to meanwhile. */
  ownTasks: string;
  close(): Promise<void>;
}

// The two unique constraints are also the indexes that serve the list and the idempotency key.
const SCHEMA = `
  CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, notes TEXT, status TEXT NOT NULL, due_at TEXT,
    created_at BIGINT NOT NULL, updated_at BIGINT NOT NULL, idempotency_key TEXT,
    UNIQUE (owner, created_at), UNIQUE (owner, idempotency_key));
  CREATE INDEX IF NOT EXISTS tasks_by_status ON tasks (owner, status, created_at);
  CREATE TABLE IF NOT EXISTS health (id INTEGER PRIMARY KEY, checked_at BIGINT NOT NULL)`;
const COLUMNS = "id, title, notes, status, due_at, created_at, updated_at";

/** Tasks in SQL that both databases understand. Times are whole milliseconds, `due_at` is text. */
class SqlStore implements TaskStore {
  readonly #database: Database;

  constructor(database: Database) {
    this.#database = database;
  }

  async list(owner: string, { status, before, limit }: Parameters<TaskStore["list"]>[1]) {
    const [condition, values] = status === undefined ? ["", []] : ["AND status = $4", [status]];
    const rows = await this.#database.query(
      `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND created_at < $2 ${condition} ORDER BY created_at DESC
       LIMIT CAST($3 AS BIGINT)`,
      [owner, before, limit, ...values],
    );
    return rows.map(toTask);
  }

  async create(owner: string, { title, notes, due_at }: NewTask, key: string | null = null) {
    // Each of an owner's tasks has a time of its own, later than the one before: that makes the order, and with
    // it the cursor, exact even within a millisecond or when the clock steps back.
    const [row] = await this.#database.query(
      `INSERT INTO tasks (owner, id, title, notes, due_at, idempotency_key, status, created_at, updated_at)
       SELECT $1, $2, $3, $4, $5, $6, 'todo', now, now FROM (
         SELECT count, CASE WHEN newest >= CAST($7 AS BIGINT) THEN newest + 1 ELSE CAST($7 AS BIGINT) END AS now
           FROM ${this.#database.ownTasks}) AS own
       WHERE count < ${MAX_TASKS}
       ON CONFLICT (owner, idempotency_key) DO NOTHING RETURNING ${COLUMNS}`,
      [owner, randomUUID(), title, notes, due_at, key, Date.now()],
    );
    if (row !== undefined) return toTask(row);
    const [known] = await this.#database.query(
      `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND idempotency_key = $2`,
      [owner, key],
    );
    return known && toTask(known);
  }

  async update(owner: string, id: string, { title, notes, due_at, status }: Changes) {
    const given = Object.entries({ title, notes, due_at, status, updated_at: Date.now() })
      .flatMap(([column, value]) => value === undefined ? [] : [[column, value] as const]);
    const assignments = given.map(([column], index) => `${column} = $${index + 3}`).join(", ");
    const [row] = await this.#database.query(
      `UPDATE tasks SET ${assignments} WHERE owner = $1 AND id = $2 RETURNING ${COLUMNS}`,
      [owner, id, ...given.map(([, value]) => value)],
    );
    return row && toTask(row);
  }

  async delete(owner: string, id: string) {
    const rows = await this.#database.query("DELETE FROM tasks WHERE owner = $1 AND id = $2 RETURNING id", [
      owner,
      id,
    ]);
    return rows.length > 0;
  }

  async check() {
    await this.#database.query(
      "INSERT INTO health (id, checked_at) VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET checked_at = excluded.checked_at",
      [Date.now()],
    );
  }

  close() {
    return this.#database.close();
  }
}

function toTask(row: Record<string, unknown>): Task {
  const { id, title, notes, status, due_at } = row;
  const created_at = toIso(row.created_at);
  const updated_at = row.updated_at === row.created_at ? created_at : toIso(row.updated_at);
  return { id, title, notes, status, due_at, created_at, updated_at } as Task;
}

/** PostgreSQL gives whole numbers of 64 bits as text. */
const toIso = (milliseconds: unknown) => new Date(Number(milliseconds)).toISOString();

class NoSqlite extends Error {
  override message = "This runtime has no node:sqlite (Node 22.13 and later, and Deno, have it)";
}

/** @param url `file:` and a path, or a file URL. */
async function openSqlite(url: string): Promise<Database> {
  const { DatabaseSync } = await import("node:sqlite").catch(() => {
    throw new NoSqlite();
  });
  const database = new DatabaseSync(
    url.startsWith("file://") ? fileURLToPath(url) : url.slice("file:".length),
  );
  // FULL: an acknowledged write survives a power cut, too. The time-out is for the start alone: later it would
  // hold up every user of this process while another one writes.
  database.exec(
    `PRAGMA busy_timeout = 5000; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; ${SCHEMA}; PRAGMA busy_timeout = 0`,
  );
  const statements = new Map<string, ReturnType<typeof database.prepare>>();

  function run(sql: string, values: Value[]) {
    const statement = statements.get(sql) ?? database.prepare(sql.replaceAll("$", "?"));
    statements.set(sql, statement);
    return statement.all(...values);
  }

  return {
    async query(sql, values) {
      const deadline = Date.now() + 3_000;
      for (;;) {
        try {
          return run(sql, values);
        } catch (error) {
          const SQLITE_BUSY = 5; // another process is writing; the higher bits tell why
          const code = error instanceof Error && "errcode" in error ? Number(error.errcode) & 0xff : 0;
          if (code !== SQLITE_BUSY || Date.now() > deadline) throw error;
          await delay(10);
        }
      }
    },
    ownTasks: "(SELECT count(*) AS count, max(created_at) AS newest FROM tasks WHERE owner = $1)",
    close: () => Promise.resolve(database.close()),
  };
}

// Without a transaction that the client holds open, which postgres.js 3.4 does not end well when its connection is
// lost (porsager/postgres#1208). A VOLATILE function sees what was committed while it waited for the lock.
const POSTGRES_SCHEMA = `
  SELECT pg_advisory_xact_lock(0);
  ${SCHEMA};
  CREATE OR REPLACE FUNCTION own_tasks(owner TEXT, OUT count BIGINT, OUT newest BIGINT) VOLATILE LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(hashtextextended(own_tasks.owner, 0));
    SELECT count(*), max(created_at) FROM tasks WHERE tasks.owner = own_tasks.owner
  $$`;

/** Loaded only when asked for: `npm install postgres`. TLS is as the URL's `sslmode` says. */
async function openPostgres(url: string): Promise<Database> {
  const { default: postgres } = await import("postgres").catch(() => {
    throw new Error("its driver is missing, run: npm install postgres");
  });
  const connect = () =>
    postgres(url, {
      max: 10,
      connect_timeout: 5, // seconds
      backoff: false, // while the database is away a call fails at once, and the first one after its return succeeds
      connection: { application_name: "tasks", statement_timeout: 5_000 }, // milliseconds
      onnotice: () => {}, // "relation already exists, skipping"
    });
  let sql = connect();
  await sql.unsafe(POSTGRES_SCHEMA);

  return {
    async query(text, values) {
      const used = sql;
      const answered = new AbortController();
      const timeout = delay(8_000, undefined, { signal: answered.signal }).then(() => {
        throw new Error("no answer from PostgreSQL in 8 seconds");
      });
      try {
        return await Promise.race([used.unsafe(text, values, { prepare: true }), timeout]);
      } catch (error) {
        // A connection is lost, and the driver may never get over it (porsager/postgres#1208); or its host is gone,
        // and TCP would wait for that for a quarter of an hour. So all are made anew.
        const isLost = !(error instanceof postgres.PostgresError) || error.severity !== "ERROR";
        if (isLost && used === sql) {
          sql = connect();
          void used.end({ timeout: 1 });
        }
        throw error;
      } finally {
        answered.abort();
      }
    },
    ownTasks: "own_tasks($1)",
    close: () => sql.end({ timeout: 2 }),
  };
}
