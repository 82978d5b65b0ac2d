/**
 * What the user may do, and with whose tasks: the tools, and the store behind them.
 *
 * Knows a `Caller`, and nothing of HTTP. Every query is bound to the caller's subject. To make the template yours,
 * replace the schemas, the tools and the store in this file; server.ts and auth.ts stay as they are.
 */
import { randomUUID } from "node:crypto";
import { isBuiltin } from "node:module";
import { setTimeout as delay } from "node:timers/promises";
// @ts-types="@modelcontextprotocol/sdk/server/mcp"
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import { CallToolRequestSchema, ListToolsRequestSchema, ToolSchema } from "@modelcontextprotocol/sdk/types.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import type { CallToolResult, Tool as ListedTool } from "@modelcontextprotocol/sdk/types.js";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/sdk/validation/ajv";
import { z } from "zod";
import { challenge, describeError } from "./auth.ts";
import type { Caller, ProtectedResource } from "./auth.ts";

export const RESOURCE_NAME = "Tasks";

// ------------------------------------------------------------------------------------------------- the task

const statusSchema = z.enum(["todo", "in_progress", "done"]);

/** A task as every tool returns it. Its fields are the columns of the table, too. */
const taskSchema = z.object({
  id: z.string(),
  title: z.string(),
  notes: z.string().nullable(),
  status: statusSchema,
  due_at: z.string().nullable().describe("ISO 8601 in UTC, as the times below"),
  created_at: z.string(),
  updated_at: z.string(),
});
export type Task = z.infer<typeof taskSchema>;

const MAX_TASKS_PER_USER = 1_000;

/** Text that every database takes: PostgreSQL stores no NUL. */
const textSchema = z.string().refine((text) => !text.includes("\0"), "It must not hold the character NUL");

const titleSchema = textSchema.trim().min(1).max(200).describe("What to do, in the user's words");
const notesSchema = textSchema.max(4_000).nullable().describe("Details; null for none");
const dueAtSchema = z.iso.datetime({ offset: true }).transform((time) => new Date(time).toISOString())
  .nullable()
  .describe("When it is due, ISO 8601 with a time zone such as 2026-12-01T09:00:00+01:00; null for no date");
const idSchema = textSchema.min(1).max(100).describe("The id of a task, from list_tasks or create_task");
/** The last task of a page. The next page starts after it, whatever is added or deleted meanwhile. */
const cursorSchema = z.string().regex(/^[-\d:.TZ]{24}_[-\da-f]{36}$/, "It must be the next_cursor of a page")
  .transform((cursor) => ({ created_at: cursor.slice(0, 24), id: cursor.slice(25) }));

/**
 * Where tasks live. Every call names the owner, and reaches no others' tasks. A write that has returned
 * survives the end of the process. Failures of the database are thrown as they come.
 */
export interface TaskStore {
  /** Newest first, in the order of (created_at, id). */
  list(owner: string, page: Page): Promise<Task[]>;
  /** The task as it is stored, or the one that the same key stored before; undefined when there are too many. */
  create(owner: string, task: Task, idempotencyKey?: string): Promise<Task | undefined>;
  /** The changed task; undefined when the owner has none with this id. */
  update(owner: string, id: string, changes: Partial<Task> & Pick<Task, "updated_at">): Promise<Task | undefined>;
  /** Whether there was such a task. */
  delete(owner: string, id: string): Promise<boolean>;
  /** Throws when the store does not answer. Writes nothing. */
  check(): Promise<void>;
  close(): Promise<void>;
}

interface Page {
  status?: Task["status"] | undefined;
  /** The last task of the page before. */
  after?: Pick<Task, "created_at" | "id"> | undefined;
  limit: number;
}

// ------------------------------------------------------------------------------------------------ the tools

/** What a tool works with. */
interface Context {
  caller: Caller;
  store: TaskStore;
  /** Aborted when the client has gone. */
  signal: AbortSignal;
}

/** A refusal that the model can act on: its message becomes the text of a tool error. */
class ToolError extends Error {}

const tools = [
  defineTool({
    name: "get_profile",
    title: "Get my profile",
    description: "Use this to learn which account is signed in. Not for tasks.",
    inputSchema: z.object({}),
    example: {},
    outputSchema: z.object({
      id: z.string().min(1),
      name: z.string().optional(),
      email: z.string().optional(),
      nickname: z.string().optional(),
    }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    // ChatGPT calls the tool with this mark to tell linked accounts apart, and wants these four fields at most.
    _meta: { "openai/profile": true },
    run: async (_, { caller }) => ({ ...caller.profile, id: caller.subject }),
  }),

  defineTool({
    name: "list_tasks",
    scope: "tasks:read",
    title: "List tasks",
    description: "Use this when the user asks what there is to do, and to find the id of a task before changing it. " +
      "Newest first; pass next_cursor as cursor for the next page.",
    inputSchema: z.object({
      status: statusSchema.optional().describe("Only tasks with this status"),
      limit: z.int().min(1).max(100).default(20).describe("How many at most"),
      cursor: cursorSchema.optional().describe("next_cursor of the page before"),
    }),
    example: { status: "todo", limit: 20 },
    outputSchema: z.object({ tasks: z.array(taskSchema), next_cursor: z.string().optional() }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    async run({ status, limit, cursor }, { caller, store }) {
      // One more than asked for tells whether there is a next page.
      const found = await store.list(caller.subject, { status, after: cursor, limit: limit + 1 });
      const tasks: Task[] = [];
      let length = 0; // in characters: hosts cut long results, so a page of long tasks ends sooner
      for (const task of found.slice(0, limit)) {
        length += JSON.stringify(task).length;
        if (length < 99_000) tasks.push(task);
      }
      const last = tasks.at(-1);
      return last && found.length > tasks.length ? { tasks, next_cursor: `${last.created_at}_${last.id}` } : { tasks };
    },
  }),

  defineTool({
    name: "create_task",
    scope: "tasks:write",
    title: "Create a task",
    description:
      "Use this when the user wants to remember or plan something new. Not for changing a task: see update_task.",
    inputSchema: z.object({
      title: titleSchema,
      notes: notesSchema.default(null),
      due_at: dueAtSchema.default(null),
      // A model may repeat a call whose reply it lost; the key makes the second one harmless.
      idempotency_key: textSchema.min(1).max(200).optional()
        .describe("Any string made up for this task: calling again with it gives the same task back"),
    }),
    example: { title: "Buy oat milk", due_at: "2026-12-01T09:00:00+01:00" },
    outputSchema: z.object({ task: taskSchema }),
    annotations: { readOnlyHint: false, destructiveHint: false, idempotentHint: false, openWorldHint: false },
    async run({ idempotency_key, ...fields }, { caller, store }) {
      // The owner comes from the token, never from the input.
      const task = await store.create(caller.subject, newTask(fields), idempotency_key);
      if (task) return { task };
      throw new ToolError(
        `There are ${MAX_TASKS_PER_USER} tasks already, the most a user can have. Delete some with delete_task first`,
      );
    },
  }),

  defineTool({
    name: "update_task",
    scope: "tasks:write",
    title: "Change a task",
    description: "Use this to rename, reschedule, annotate, start, finish or reopen a task that exists. " +
      "Fields that are left out stay as they are.",
    inputSchema: z.object({
      id: idSchema,
      title: titleSchema.exactOptional(),
      notes: notesSchema.exactOptional(),
      due_at: dueAtSchema.exactOptional(),
      status: statusSchema.exactOptional(),
    }),
    example: { id: "0b9d3c1e-5a43-4c0f-9d0a-2f6d1c9b7e55", status: "done" },
    outputSchema: z.object({ task: taskSchema }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    async run({ id, ...changes }, { caller, store }) {
      const task = await store.update(caller.subject, id, { ...changes, updated_at: now() });
      if (task) return { task };
      throw unknownTask(id);
    },
  }),

  defineTool({
    name: "delete_task",
    scope: "tasks:write",
    title: "Delete a task",
    description:
      "Use this only when the user wants a task gone for good. For a finished one, set its status with update_task.",
    inputSchema: z.object({ id: idSchema }),
    example: { id: "0b9d3c1e-5a43-4c0f-9d0a-2f6d1c9b7e55" },
    outputSchema: z.object({ deleted: z.string() }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    async run({ id }, { caller, store }) {
      if (await store.delete(caller.subject, id)) return { deleted: id };
      throw unknownTask(id);
    },
  }),
];

export function newTask(fields: Omit<Task, "id" | "status" | "created_at" | "updated_at">): Task {
  const time = now();
  return { id: randomUUID(), ...fields, status: "todo", created_at: time, updated_at: time };
}

let latest = 0;

/** Later than any before it in this process, so that tasks of one millisecond keep their order. */
function now(): string {
  latest = Math.max(Date.now(), latest + 1);
  return new Date(latest).toISOString();
}

function unknownTask(id: string) {
  return new ToolError(`id: no task has the id ${id}. Call list_tasks for those there are`);
}

// ----------------------------------------------------------------------------------------- a tool's two sides

/** What a tool's author writes. The two schemas type `run`, which returns the structured content. */
interface Definition<Input extends z.ZodObject, Output extends z.ZodObject>
  extends Pick<ListedTool, "name" | "title" | "description" | "annotations" | "_meta"> {
  /** Needed where ENFORCE_SCOPES is on; a tool without one is open to every signed-in user. */
  scope?: string;
  inputSchema: Input;
  /** Input that works, shown to who sends what does not. */
  example: z.input<Input>;
  outputSchema: Output;
  run(input: z.output<Input>, context: Context): Promise<z.output<Output>>;
}

/** Makes of a definition what the tool lists and how it is called. */
function defineTool<Input extends z.ZodObject, Output extends z.ZodObject>(
  { scope, inputSchema, outputSchema, example, run, ...listed }: Definition<Input, Output>,
) {
  return {
    scope,
    listed: { ...listed, inputSchema: toJsonSchema(inputSchema), outputSchema: toJsonSchema(outputSchema) },
    async call(input: Record<string, unknown>, context: Context): Promise<Record<string, unknown>> {
      const given = { ...input };
      for (const [name, schema] of Object.entries(inputSchema.shape)) {
        // Models send null for what they leave out. It counts as left out, unless the schema gives null a meaning.
        if (given[name] === null && !schema.safeParse(null).success) delete given[name];
      }
      const { success, data, error } = inputSchema.safeParse(given);
      if (success) return await run(data, context);
      const problems = error.issues.map(({ path, message }) => `${path.join(".")}: ${message}`);
      throw new ToolError(`${problems.join("; ")}. Input that works: ${JSON.stringify(example)}`);
    },
  };
}

/** The schema without what some hosts cannot read; its rules hold all the same when the tool is called. */
function toJsonSchema(schema: z.ZodObject): ListedTool["inputSchema"] {
  const { $schema: _, ...listed } = z.toJSONSchema(schema, {
    io: "input",
    override({ jsonSchema }) {
      delete jsonSchema.pattern;
      if (jsonSchema.format !== "date-time") delete jsonSchema.format;
      if (jsonSchema.type === "object") jsonSchema.additionalProperties = false; // some hosts insist on it
    },
  });
  return ToolSchema.shape.inputSchema.parse(listed); // for its type
}

// ------------------------------------------------------------------------------------------------ MCP server

/**
 * What a client should ask for to call these tools: with ENFORCE_SCOPES the API's permissions, since Auth0 grants no
 * others for it. `offline_access` is always there: without it clients ask for no refresh token, and users have to sign
 * in again every day. ChatGPT and the SDK's clients ask for the union of what the tools list.
 */
export function requestedScopes(enforceScopes: boolean, listed: { scope?: string | undefined }[] = tools): string[] {
  if (!enforceScopes) return ["openid", "profile", "email", "offline_access"];
  return [...new Set(listed.flatMap(({ scope }) => scope ?? [])), "offline_access"];
}

/** What is the same for every request. */
interface ServerOptions {
  resource: ProtectedResource;
  enforceScopes: boolean;
  store: TaskStore;
  /** Takes a line for the operator: a refusal, or a failure that is not the caller's. */
  warn: (line: string) => void;
}

/**
 * Gives back what makes the MCP server of a single request: one that clients share would hand one's answers to
 * another (SDK advisory GHSA-345p-7cg4-v4c7). Schemas and lists are made here, once.
 *
 * The two handlers stand where the SDK's documentation calls `registerTool`, which drops the top-level
 * `securitySchemes` that OpenAI documents, and would make every schema anew for each request.
 */
export function createMcpServerFactory({ resource, enforceScopes, store, warn }: ServerOptions) {
  const info = { name: "tasks", title: RESOURCE_NAME, version: "1.0.0" };
  const options = {
    instructions: "Each signed-in user's own task list.",
    jsonSchemaValidator: new AjvJsonSchemaValidator(), // made per request, as by default, it costs 0.3 ms
  };
  const list = tools.map((tool) => {
    const securitySchemes = [{ type: "oauth2", scopes: requestedScopes(enforceScopes, [tool]) }];
    return { ...tool.listed, securitySchemes, _meta: { ...tool.listed._meta, securitySchemes } }; // _meta: older hosts
  });

  /** Whatever goes wrong is a tool error that the model can read, never an exception. */
  async function callTool(name: string, input: Record<string, unknown>, context: Context): Promise<CallToolResult> {
    const tool = tools.find(({ listed }) => listed.name === name);
    if (tool === undefined) {
      const names = tools.map(({ listed }) => listed.name).join(", ");
      return toolError(`There is no tool ${name.slice(0, 100)}. There are ${names}`);
    }
    const { scope } = tool;
    if (enforceScopes && scope && !context.caller.scopes.has(scope)) {
      warn(`${name} refused to ${context.caller.subject}: the token does not grant ${scope}`);
      return insufficientScope(scope, resource);
    }
    try {
      const structuredContent = await tool.call(input, context);
      // The same twice, for hosts that read only one of the two (MCP 2025-11-25, Tools, Structured Content).
      return { content: [{ type: "text", text: JSON.stringify(structuredContent) }], structuredContent };
    } catch (error) {
      if (error instanceof ToolError) return toolError(error.message);
      warn(`${name} failed: ${describeError(error)}`);
      return toolError(
        `${name} failed, and the server's log says why. Try again in a minute; a change may have been made or not, ` +
          "so look first",
      );
    }
  }

  return (caller: Caller): McpServer => {
    const mcpServer = new McpServer(info, options);
    const { server } = mcpServer;
    server.registerCapabilities({ tools: {} }); // given as an option it would become listChanged, too
    server.setRequestHandler(ListToolsRequestSchema, () => ({ tools: list }));
    server.setRequestHandler(
      CallToolRequestSchema,
      ({ params }, { signal }) => callTool(params.name, params.arguments ?? {}, { caller, store, signal }),
    );
    return mcpServer;
  };
}

function toolError(text: string): CallToolResult {
  return { isError: true, content: [{ type: "text", text }] };
}

/**
 * The refusal in the form that ChatGPT documents: it then offers to sign in again for what is missing. The
 * challenge asks for all scopes at once, since a client that asks for one alone would lose the others.
 */
function insufficientScope(scope: string, resource: ProtectedResource): CallToolResult {
  const description =
    `This tool needs the permission ${scope}, which the token does not grant: README, Permissions per tool`;
  const header = challenge(resource, { error: "insufficient_scope", error_description: description });
  return { ...toolError(description), _meta: { "mcp/www_authenticate": [header] } };
}

// ------------------------------------------------------------------------------------------------- the store

const isPostgres = (url: string) => /^postgres(ql)?:/.test(url);

/** What DATABASE_URL may be. A URL that cannot be parsed would be quoted by drivers, its password with it. */
export const databaseUrlSchema = z.string()
  .refine((url) => url === "memory:" || /^file:./.test(url) || (isPostgres(url) && URL.canParse(url)), "is no such URL")
  .optional()
  .describe("file:tasks.db, memory: or postgres://user:password@host/database (in a password, # is written %23)");

/**
 * Opens the store that DATABASE_URL names.
 *
 * @param url Undefined for `file:tasks.db` where the runtime has SQLite, else memory and a warning.
 * @throws {Error} A line for the operator, when what was asked for cannot be had or cannot be written to.
 */
export async function openTaskStore(url: string | undefined, warn: (line: string) => void): Promise<TaskStore> {
  const asked = url ?? (isBuiltin("node:sqlite") ? "file:tasks.db" : "memory:");
  if (url === undefined && asked === "memory:") {
    warn("This runtime has no node:sqlite: tasks are kept in memory, and lost when the server stops");
  }
  if (asked === "memory:") return memoryStore();
  try {
    const database = await (isPostgres(asked) ? openPostgres(asked, warn) : openSqlite(asked));
    await migrate(database).catch(async (error) => {
      await database.close();
      throw error;
    });
    return sqlStore(database);
  } catch (error) {
    const name = isPostgres(asked) ? "PostgreSQL" : asked; // a postgres URL holds a password
    throw new Error(`DATABASE_URL: ${name} cannot be used: ${describeError(error)}`, { cause: error });
  }
}

/** For tests, and for runtimes without SQLite. */
function memoryStore(): TaskStore {
  const entries = new Map<string, { task: Task; key: string | undefined }[]>(); // each owner's, newest first
  const of = (owner: string) => entries.get(owner) ?? [];
  return {
    async list(owner, { status, after, limit }) {
      return of(owner).map(({ task }) => task)
        .filter((task) => status === undefined || task.status === status)
        .filter((task) => after === undefined || task.created_at < after.created_at)
        .slice(0, limit);
    },
    async create(owner, task, key) {
      const known = of(owner).find((entry) => key !== undefined && entry.key === key);
      if (known !== undefined || of(owner).length >= MAX_TASKS_PER_USER) return known?.task;
      entries.set(owner, [{ task, key }, ...of(owner)]);
      return task;
    },
    async update(owner, id, changes) {
      const entry = of(owner).find(({ task }) => task.id === id);
      if (entry !== undefined) entry.task = { ...entry.task, ...changes };
      return entry?.task;
    },
    async delete(owner, id) {
      const found = of(owner).find(({ task }) => task.id === id);
      entries.set(owner, of(owner).filter((entry) => entry !== found));
      return found !== undefined;
    },
    async check() {},
    async close() {},
  };
}

/** What SQLite and PostgreSQL differ in. */
interface Database {
  /** One statement, with the values for its `$1`, `$2`, … Its rows are tasks; those of other tables are only counted. */
  query(sql: string, values?: (string | number | null)[]): Promise<Task[]>;
  /** Several statements: all of them, or none. */
  transaction(script: string): Promise<void>;
  close(): Promise<void>;
}

/**
 * What makes the tables, in order. To change them, append a statement that both databases understand, and leave
 * those before it as they are: each start applies what a database has not had yet.
 */
const MIGRATIONS = [
  `CREATE TABLE tasks (
     id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, notes TEXT, status TEXT NOT NULL, due_at TEXT,
     created_at TEXT NOT NULL, updated_at TEXT NOT NULL, idempotency_key TEXT, UNIQUE (owner, idempotency_key));
   CREATE INDEX tasks_by_time ON tasks (owner, created_at, id)`,
];

async function migrate({ query, transaction }: Database): Promise<void> {
  const isApplied = async (number: number) =>
    (await query("SELECT number FROM schema_changes WHERE number = $1", [number])).length > 0;
  // The DELETE finds nothing, and fails where the database can only be read.
  await transaction(`CREATE TABLE IF NOT EXISTS schema_changes (number INTEGER PRIMARY KEY);
    DELETE FROM schema_changes WHERE number < 0`);
  for (const [number, migration] of MIGRATIONS.entries()) {
    if (await isApplied(number)) continue;
    try {
      await transaction(`INSERT INTO schema_changes VALUES (${number}); ${migration}`);
    } catch (error) {
      if (await isApplied(number)) continue; // another server, started beside this one, was faster
      const isOlder = number === 0 && /already exists/.test(describeError(error));
      throw isOlder ? new Error("it holds tables of an older template. Name another one, or rename them") : error;
    }
  }
}

const COLUMNS = Object.keys(taskSchema.shape).join(", ");

/** Tasks in SQL that both databases understand. All columns are text. */
function sqlStore({ query, close }: Database): TaskStore {
  return {
    list: (owner, { status = null, after = { created_at: "9999", id: "" }, limit }) =>
      query(
        `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND (created_at, id) < ($2, $3) AND status = COALESCE($4, status)
           ORDER BY created_at DESC, id DESC LIMIT $5`,
        [owner, after.created_at, after.id, status, limit],
      ),
    async create(owner, task, key) {
      const row = { owner, idempotency_key: key ?? null, ...task }; // $1 is the owner, below
      const placeholders = Object.keys(row).map((_, index) => `$${index + 1}`);
      const [created] = await query(
        `INSERT INTO tasks (${Object.keys(row).join(", ")}) SELECT ${placeholders.join(", ")}
           WHERE (SELECT count(*) FROM tasks WHERE owner = $1) < ${MAX_TASKS_PER_USER}
           ON CONFLICT (owner, idempotency_key) DO NOTHING RETURNING ${COLUMNS}`,
        Object.values(row),
      );
      if (created !== undefined || key === undefined) return created;
      const sql = `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND idempotency_key = $2`;
      return (await query(sql, [owner, key]))[0];
    },
    async update(owner, id, changes) {
      const assignments = Object.keys(changes).map((column, index) => `${column} = $${index + 3}`);
      const sql = `UPDATE tasks SET ${assignments.join(", ")} WHERE owner = $1 AND id = $2 RETURNING ${COLUMNS}`;
      return (await query(sql, [owner, id, ...Object.values(changes)]))[0];
    },
    async delete(owner, id) {
      const sql = `DELETE FROM tasks WHERE owner = $1 AND id = $2 RETURNING ${COLUMNS}`;
      return (await query(sql, [owner, id])).length > 0;
    },
    async check() {
      await query("SELECT id FROM tasks LIMIT 1");
    },
    close,
  };
}

/** SQLite reads `file:` URLs itself. */
async function openSqlite(url: string): Promise<Database> {
  const { DatabaseSync } = await import("node:sqlite");
  const database = new DatabaseSync(url);
  const statements = new Map<string, ReturnType<typeof database.prepare>>();

  /** Tries again while another process writes. SQLite's own busy_timeout would hold up all users of this process. */
  async function whenFree<Result>(work: () => Result, tries = 300): Promise<Result> {
    try {
      return work();
    } catch (error) {
      if (tries === 0 || !describeError(error).includes("database is locked")) throw error;
      await delay(10);
      return whenFree(work, tries - 1);
    }
  }

  // FULL: an acknowledged write survives a power cut, too.
  await whenFree(() => database.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL"));
  return {
    query: (sql, values = []) =>
      whenFree(() => {
        const statement = statements.get(sql) ?? database.prepare(sql);
        statements.set(sql, statement); // a list takes 30 µs with a prepared statement, and 57 µs without
        const named = Object.fromEntries(values.map((value, index) => [`$${index + 1}`, value]));
        return statement.all(named) as unknown as Task[];
      }),
    transaction: (script) =>
      whenFree(() => {
        database.exec("BEGIN IMMEDIATE");
        try {
          database.exec(`${script}; COMMIT`);
        } catch (error) {
          // On a full disk SQLite has ended it already. Node before 22.16 does not tell.
          if (database.isTransaction !== false) database.exec("ROLLBACK");
          throw error;
        }
      }),
    close: () => Promise.resolve(database.close()),
  };
}

/** TLS is as the URL's `sslmode` says, read as libpq reads it: `require` encrypts and checks no certificate. */
async function openPostgres(url: string, warn: (line: string) => void): Promise<Database> {
  const { default: pg } = await import("pg").catch(() => {
    throw new Error("its driver is missing, run: npm install --save-prod pg");
  });
  const options = {
    connectionString: `${url}${url.includes("?") ? "&" : "?"}uselibpqcompat=true`,
    fallback_application_name: "tasks",
    connectionTimeoutMillis: 5_000,
    query_timeout: 3_000, // milliseconds: a host that has vanished answers nothing at all
  };
  // Ends what waits for a lock in the database, too; without it such statements pile up there.
  let pool = new pg.Pool({ ...options, statement_timeout: 2_500 });
  try {
    await pool.query("SELECT 1");
  } catch (error) {
    await pool.end();
    const PROTOCOL_VIOLATION = "08P01"; // what a pooler answers that takes no such setting from its clients
    if (!(error instanceof pg.DatabaseError && error.code === PROTOCOL_VIOLATION)) throw error;
    warn("The pooler refuses statement_timeout: run ALTER ROLE … SET statement_timeout = '2500ms' in the database");
    pool = new pg.Pool(options);
  }
  pool.on("error", () => {}); // an idle connection was lost: the pool opens another one when it needs it
  return {
    // Only `pool.query`, without names: poolers mix up named statements, and a client that is taken from the pool ends
    // the process when its connection breaks.
    query: async (sql, values = []) => (await pool.query(sql, values)).rows,
    // One simple query is one transaction. The lock lets servers that start at once make the tables one by one.
    async transaction(script) {
      const text = `SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(0); ${script}`;
      const config = { text, query_timeout: 600_000 }; // to change a large table takes longer than a call may
      await pool.query(config);
    },
    close: () => pool.end(),
  };
}
