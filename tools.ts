/**
 * The tools that a signed-in user can call, and the store of the users' tasks.
 *
 * There is no HTTP here: a tool gets a `Caller`, and every query names the caller's subject. Sections 1 to 3 (the task,
 * the tools, the stores) are yours to replace. Sections 4 and 5 make an MCP server of them and can stay as they are,
 * like server.ts and auth.ts. (The `@ts-types` lines are for Deno.)
 */
import { randomUUID } from "node:crypto";
import { isBuiltin } from "node:module";
import { setTimeout as delay } from "node:timers/promises";
// @ts-types="@modelcontextprotocol/sdk/server/mcp"
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import * as mcp from "@modelcontextprotocol/sdk/types.js";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/sdk/validation/ajv";
import { z } from "zod";
import { challenge, describeError } from "./auth.ts";
import type { Caller, ProtectedResource } from "./auth.ts";

// ----------------------------------------------------------------------------------------- 1. yours: the task

/** How the server introduces itself: to people, to clients, and to models. */
export const RESOURCE_NAME = "Tasks";
const SERVER_INFO = { name: "tasks", title: RESOURCE_NAME, version: "1.0.0" };
const INSTRUCTIONS = "Each signed-in user's own task list.";

const statusSchema = z.enum(["todo", "in_progress", "done"]);

/** A task as the tools return it. Each field is also a column of the table: see MIGRATIONS. */
const taskSchema = z.object({
  id: z.string(),
  title: z.string(),
  notes: z.string().describe("Details").nullable(),
  status: statusSchema,
  due_at: z.string().describe("ISO 8601 in UTC, as the times below").nullable(),
  created_at: z.string(),
  updated_at: z.string(),
});
export type Task = z.infer<typeof taskSchema>;

const MAX_TASKS_PER_USER = 1_000;

/** Text that every database and every JSON reader takes. (`\p{Cc}` is U+0000 to U+001F and U+007F to U+009F.) */
const textSchema = z.string().refine((text) => text.isWellFormed(), "Holds half a surrogate pair")
  .refine((text) => !/(?![\t\n\r\x7F-\x9F])\p{Cc}/u.test(text), "Holds a control character below U+0020");

const titleSchema = textSchema.trim().min(1).max(200).describe("What to do, in the user's words");
/** Some hosts cut results over 100,000 characters: 20 tasks of 2,200, all escaped in JSON, stay below. */
const notesSchema = textSchema.max(2_000).describe("Details");
const dueAtSchema = z.iso.datetime({ offset: true }).transform((time) => new Date(time).toISOString())
  .refine((time) => time.length === 24, "Out of range") // of four-digit years, in UTC
  .describe("When it is due, ISO 8601 with a time zone, such as 2026-12-01T09:00:00+01:00");
const idSchema = textSchema.min(1).max(100).describe("The id of a task, from list_tasks or create_task");

/** Where a task stands in the list, newest first. */
type Position = Pick<Task, "created_at" | "id">;

/** A position as text. Both parts have a fixed width, so comparing two texts compares `created_at`, then `id`. */
const toCursor = ({ created_at, id }: Position) => `${created_at}_${id}`;
const cursorSchema = z.string().regex(/^[-\d:.TZ]{24}_[-\da-f]{36}$/, "Not from list_tasks")
  .transform((cursor): Position => ({ created_at: cursor.slice(0, 24), id: cursor.slice(25) }));

export function newTask({ title, notes = null, due_at = null }: Pick<Task, "title"> & Partial<Task>): Task {
  const now = new Date().toISOString();
  return { id: randomUUID(), title, notes, status: "todo", due_at, created_at: now, updated_at: now };
}

/**
 * Stores tasks. Each call names the owner and reaches only that owner's tasks. Except in memory, a write that has
 * returned survives the end of the process. Errors of the database are thrown unchanged.
 */
export interface TaskStore {
  /** Newest first. `after` is the last task of the previous page; an offset would shift when tasks come or go. */
  list(
    owner: string,
    page: { status?: Task["status"] | undefined; after?: Position | undefined; limit: number },
  ): Promise<Task[]>;
  /** The stored task, or the one stored earlier with this key; undefined when the owner has too many tasks. */
  create(owner: string, task: Task, idempotencyKey?: string): Promise<Task | undefined>;
  /** The changed task; undefined when the owner has none with this id. */
  update(owner: string, id: string, changes: Partial<Task>): Promise<Task | undefined>;
  /** Whether there was such a task. */
  delete(owner: string, id: string): Promise<boolean>;
  /** Throws when the store does not answer. Writes nothing. */
  check(): Promise<void>;
  close(): Promise<void>;
}

// ---------------------------------------------------------------------------------------- 2. yours: the tools

const tools = [
  defineTool({
    name: "get_profile",
    title: "Get my profile",
    description: "Use this to learn which account is signed in. Not for tasks.",
    inputSchema: z.object({}),
    outputSchema: z.object({
      id: z.string().min(1),
      name: z.string().optional(),
      email: z.string().optional(),
      nickname: z.string().optional(),
    }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    // ChatGPT calls the tool that has this mark to tell linked accounts apart. It accepts only these four fields.
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
    outputSchema: z.object({ tasks: z.array(taskSchema), next_cursor: z.string().optional() }),
    annotations: { readOnlyHint: true, destructiveHint: false, idempotentHint: true, openWorldHint: false },
    async run({ status, limit, cursor }, { caller, store }) {
      // One more than asked for tells whether there is a next page.
      const found = await store.list(caller.subject, { status, after: cursor, limit: limit + 1 });
      const tasks = found.slice(0, limit);
      const last = tasks.at(-1);
      return last && found.length > limit ? { tasks, next_cursor: toCursor(last) } : { tasks };
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
      notes: notesSchema.exactOptional(),
      due_at: dueAtSchema.exactOptional(),
      // A model may repeat a call whose reply it lost; the key makes the second one harmless.
      idempotency_key: textSchema.min(1).max(200).exactOptional()
        .describe("Any string made up for this task: calling again with it gives the same task back"),
    }),
    outputSchema: z.object({ task: taskSchema }),
    annotations: { readOnlyHint: false, destructiveHint: false, idempotentHint: false, openWorldHint: false },
    async run({ idempotency_key: key, ...fields }, { caller, store }) {
      // The owner comes from the token, never from the input.
      const task = await store.create(caller.subject, newTask(fields), key);
      if (task === undefined) {
        throw new ToolError(`There are ${MAX_TASKS_PER_USER} tasks, the most a user can have. Delete some first`);
      }
      if (task.title === fields.title) return { task };
      // Some models use one key for all tasks. Returning the first task would lose this one without an error.
      throw new ToolError(`idempotency_key: it made the task "${task.title}" (${task.id}) before. Use another key`);
    },
  }),

  defineTool({
    name: "update_task",
    scope: "tasks:write",
    title: "Change a task",
    description: "Use this to rename, reschedule, annotate, start, finish or reopen a task that exists. " +
      "Fields that are left out stay as they are; null clears notes and due_at.",
    inputSchema: z.object({
      id: idSchema,
      title: titleSchema.exactOptional(),
      notes: notesSchema.nullable().exactOptional(),
      due_at: dueAtSchema.nullable().exactOptional(),
      status: statusSchema.exactOptional(),
    }),
    outputSchema: z.object({ task: taskSchema }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    async run({ id, ...changes }, { caller, store }) {
      if (Object.keys(changes).length === 0) {
        throw new ToolError("Nothing to change: pass at least one of title, notes, due_at and status");
      }
      const task = await store.update(caller.subject, id, { ...changes, updated_at: new Date().toISOString() });
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
    outputSchema: z.object({ deleted: z.string() }),
    annotations: { readOnlyHint: false, destructiveHint: true, idempotentHint: true, openWorldHint: false },
    async run({ id }, { caller, store }) {
      if (await store.delete(caller.subject, id)) return { deleted: id };
      throw unknownTask(id);
    },
  }),
];

function unknownTask(id: string) {
  return new ToolError(`id: no task has the id ${id}. Call list_tasks to find the right one`);
}

// --------------------------------------------------------------------------------------- 3. yours: the stores

const isPostgres = (url: string) => /^postgres(ql)?:/.test(url);

/** What DATABASE_URL may be. A URL that does not parse is refused here: the error for it would show the password. */
export const databaseUrlSchema = z.string()
  .refine((url) => url === "memory:" || /^file:./.test(url) || (isPostgres(url) && URL.canParse(url) && !/#/.test(url)))
  .default(isBuiltin("node:sqlite") ? "file:tasks.db" : "memory:") // Node 20 has no SQLite
  .describe("file:tasks.db, memory: or postgres://user:password@host/database (in a password, # is written %23)");

/**
 * Opens the store that DATABASE_URL names.
 *
 * @throws {Error} When the database cannot be opened or written to. The message is a line for the operator.
 */
export async function openTaskStore(url: string, warn: (line: string) => void): Promise<TaskStore> {
  if (url === "memory:") {
    warn("Tasks are kept in memory, and lost when the server stops: see DATABASE_URL");
    return memoryStore();
  }
  let database: Database | undefined;
  try {
    database = await (isPostgres(url) ? openPostgres(url) : openSqlite(url.replace("file:", "")));
    await migrate(database);
    return sqlStore(database);
  } catch (error) {
    await database?.close();
    const name = isPostgres(url) ? "PostgreSQL" : url; // a postgres URL holds a password
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
        .filter((task) => after === undefined || toCursor(task) < toCursor(after))
        .slice(0, limit);
    },
    async create(owner, task, key) {
      const known = of(owner).find((entry) => key !== undefined && entry.key === key);
      if (known !== undefined || of(owner).length >= MAX_TASKS_PER_USER) return known?.task;
      entries.set(owner, [{ task, key }, ...of(owner)].sort((a, b) => toCursor(a.task) < toCursor(b.task) ? 1 : -1));
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

/** All columns of tasks are text. */
type Value = string | null;

/** What SQLite and PostgreSQL differ in. */
interface Database {
  /** Runs one statement with the values for its `$1`, `$2`, …. Returns the rows, each an array of its columns. */
  query(sql: string, values?: Value[]): Promise<Value[][]>;
  /** Runs several statements: all of them, or none. */
  transaction(script: string): Promise<void>;
  close(): Promise<void>;
}

/**
 * The statements that make the tables, in order. To change a table, append a statement that both databases understand
 * and leave the earlier ones as they are: each start applies those that its database has not had yet.
 */
const MIGRATIONS = [
  `CREATE TABLE tasks (
     id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, notes TEXT, status TEXT NOT NULL, due_at TEXT,
     created_at TEXT NOT NULL, updated_at TEXT NOT NULL, idempotency_key TEXT, UNIQUE (owner, idempotency_key));
   CREATE INDEX tasks_by_time ON tasks (owner, created_at, id)`,
];

async function migrate({ query, transaction }: Database): Promise<void> {
  const isApplied = async (number: number) =>
    (await query(`SELECT number FROM schema_changes WHERE number = ${number}`)).length > 0;
  // The DELETE removes nothing. It fails on a read-only database, where the CREATE passes if the table is there.
  await transaction(`CREATE TABLE IF NOT EXISTS schema_changes (number INTEGER PRIMARY KEY);
    DELETE FROM schema_changes WHERE number < 0`);
  for (const [number, migration] of MIGRATIONS.entries()) {
    if (await isApplied(number)) continue;
    try {
      await transaction(`INSERT INTO schema_changes VALUES (${number}); ${migration}`);
    } catch (error) {
      if (await isApplied(number)) continue; // by another server that was started at the same time
      const isOlder = number === 0 && /already exists/.test(describeError(error));
      throw isOlder ? new Error("it holds tables of an older template. Name another database, or rename them") : error;
    }
  }
}

const FIELDS = Object.keys(taskSchema.shape);
const COLUMNS = FIELDS.join(", ");

const toTask = (row: Value[]) => Object.fromEntries(FIELDS.map((field, index) => [field, row[index]])) as Task;

/** Tasks in SQL that both databases understand. */
function sqlStore({ query, close }: Database): TaskStore {
  const queryTasks = async (sql: string, values: Value[]) => (await query(sql, values)).map(toTask);

  return {
    // The default of `after` is later than any task. Without `status`, COALESCE compares each status with itself.
    // The limit is a number that zod has checked. Binding it makes SQLite prepare the statement again, for 27 µs.
    list: (owner, { status = null, after = { created_at: "9999", id: "" }, limit }) =>
      queryTasks(
        `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND (created_at, id) < ($2, $3) AND status = COALESCE($4, status)
           ORDER BY created_at DESC, id DESC LIMIT ${limit}`,
        [owner, after.created_at, after.id, status],
      ),
    async create(owner, task, key) {
      const row = { owner, idempotency_key: key ?? null, ...task }; // owner first: it is $1 in the WHERE below
      const placeholders = Object.keys(row).map((_, index) => `$${index + 1}`);
      const [created] = await queryTasks(
        `INSERT INTO tasks (${Object.keys(row).join(", ")}) SELECT ${placeholders.join(", ")}
           WHERE (SELECT count(*) FROM tasks WHERE owner = $1) < ${MAX_TASKS_PER_USER}
           ON CONFLICT (owner, idempotency_key) DO NOTHING RETURNING ${COLUMNS}`,
        Object.values(row),
      );
      if (created !== undefined || key === undefined) return created; // else the key may be in use
      const sql = `SELECT ${COLUMNS} FROM tasks WHERE owner = $1 AND idempotency_key = $2`;
      return (await queryTasks(sql, [owner, key]))[0];
    },
    async update(owner, id, changes) {
      // The keys are safe in SQL: zod has dropped every field that the tool's schema does not list.
      const assignments = Object.keys(changes).map((column, index) => `${column} = $${index + 3}`);
      const sql = `UPDATE tasks SET ${assignments.join(", ")} WHERE owner = $1 AND id = $2 RETURNING ${COLUMNS}`;
      return (await queryTasks(sql, [owner, id, ...Object.values(changes)]))[0];
    },
    async delete(owner, id) {
      return (await query("DELETE FROM tasks WHERE owner = $1 AND id = $2 RETURNING id", [owner, id])).length > 0;
    },
    async check() {
      await query("SELECT id FROM tasks LIMIT 1");
    },
    close,
  };
}

async function openSqlite(path: string): Promise<Database> {
  const { DatabaseSync } = await import("node:sqlite");
  const database = new DatabaseSync(path);
  const statements = new Map<string, ReturnType<typeof database.prepare>>();

  /** Tries for 3 s while another process writes. SQLite's own busy_timeout would block the event loop meanwhile. */
  async function retryWhileLocked<Result>(work: () => Result, tries = 300): Promise<Result> {
    try {
      return work();
    } catch (error) {
      if (tries === 0 || !describeError(error).includes("database is locked")) throw error;
      await delay(10);
      return retryWhileLocked(work, tries - 1);
    }
  }

  // FULL: a write that has returned survives a power cut, too.
  await retryWhileLocked(() => database.exec("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL"));
  return {
    query: (sql, values = []) =>
      retryWhileLocked(() => {
        const statement = statements.get(sql) ?? database.prepare(sql);
        statement.setReturnArrays(true); // ten tasks take 35 µs more as objects
        statements.set(sql, statement); // a list takes 30 µs with a prepared statement, and 57 µs without
        const named = Object.fromEntries(values.map((value, index) => [`$${index + 1}`, value])); // $1 is a name here
        return statement.all(named) as unknown as Value[][]; // the type of `all` allows for objects only
      }),
    transaction: (script) =>
      retryWhileLocked(() => {
        database.exec("BEGIN IMMEDIATE");
        try {
          database.exec(`${script}; COMMIT`);
        } catch (error) {
          if (database.isTransaction) database.exec("ROLLBACK"); // on a full disk SQLite has rolled back already
          throw error;
        }
      }),
    close: async () => database.close(),
  };
}

/** The URL's `sslmode` has the meaning that libpq gives it: `require` encrypts, and does not check the certificate. */
async function openPostgres(url: string): Promise<Database> {
  const { default: pg } = await import("pg").catch(() => {
    throw new Error("its driver is missing, run: npm install --save-prod pg");
  });
  const pool = new pg.Pool({
    connectionString: `${url}${url.includes("?") ? "&" : "?"}uselibpqcompat=true`,
    fallback_application_name: "tasks",
    connectionTimeoutMillis: 5_000,
    query_timeout: 3_000, // milliseconds, also where the host no longer answers
  });
  pool.on("error", () => {}); // an idle connection was lost: the pool opens another one when it needs it
  return {
    // Always `pool.query`: a client taken from the pool ends the process when its connection breaks. Never a named
    // statement: poolers mix them up.
    query: async (sql, values = []) => (await pool.query({ text: sql, values, rowMode: "array" })).rows,
    // Several statements in one query are one transaction. The lock makes servers that start together take turns.
    async transaction(script) {
      const text = `SET LOCAL statement_timeout = 0; SELECT pg_advisory_xact_lock(0); ${script}`;
      const config = { text, query_timeout: 600_000 }; // 10 minutes, for large tables. pg's types refuse it inline
      await pool.query(config);
    },
    close: () => pool.end(),
  };
}

// ------------------------------------------------------------------------------- 4. the template's: defineTool

/** What a tool works with. */
interface Context {
  caller: Caller;
  store: TaskStore;
  /** Aborted when the client has gone. For tools that wait: pass it to `fetch`. */
  signal: AbortSignal;
}

/** A refusal that the model can act on: its message becomes the text of a tool error. */
class ToolError extends Error {}

/** A tool as written in section 2. The schemas give `run` its types; it returns the structured content. */
interface Definition<Input extends z.ZodObject, Output extends z.ZodObject>
  extends Pick<mcp.Tool, "name" | "title" | "description" | "annotations" | "_meta"> {
  /** With ENFORCE_SCOPES the token must grant it. A tool without a scope is open to every signed-in user. */
  scope?: string;
  inputSchema: Input;
  outputSchema: Output;
  run(input: z.output<Input>, context: Context): Promise<z.output<Output>>;
}

/** Turns a definition into what `tools/list` shows of it and what `tools/call` runs. */
function defineTool<Input extends z.ZodObject, Output extends z.ZodObject>(
  { scope, inputSchema, outputSchema, run, ...rest }: Definition<Input, Output>,
) {
  const listed = { ...rest, inputSchema: toJsonSchema(inputSchema), outputSchema: toJsonSchema(outputSchema) };
  return {
    scope,
    listed,
    async call(input: Record<string, unknown>, context: Context): Promise<Record<string, unknown>> {
      const given = { ...input };
      for (const [name, schema] of Object.entries(inputSchema.shape)) {
        // Models send null for what they leave out. It counts as left out, unless the schema gives null a meaning.
        if (given[name] === null && !schema.safeParse(null).success) delete given[name];
      }
      const { success, data, error } = inputSchema.safeParse(given);
      if (success) return await run(data, context);
      const problems = error.issues.map(({ path, message }) => {
        const takes = JSON.stringify(listed.inputSchema.properties?.[String(path[0])]);
        return `${path.join(".")}: ${message}. It takes ${takes}`;
      });
      throw new ToolError(problems.join("\n"));
    },
  };
}

/** Leaves out what llama.cpp, OpenAI or Gemini refuse. In a call zod still checks it, and ignores unknown fields. */
function toJsonSchema(schema: z.ZodObject): mcp.Tool["inputSchema"] {
  const { $schema: _, ...listed } = z.toJSONSchema(schema, {
    io: "input",
    override({ jsonSchema }) {
      delete jsonSchema.pattern;
      if (jsonSchema.format !== "date-time") delete jsonSchema.format;
      if (jsonSchema.type === "object") jsonSchema.additionalProperties ??= false; // OpenAI Agents requires it
    },
  });
  return mcp.ToolSchema.shape.inputSchema.parse(listed); // for its type
}

// ------------------------------------------------------------------------------ 5. the template's: MCP server

/**
 * The scopes to request for these tools: with ENFORCE_SCOPES the tools' own, otherwise those of OpenID Connect. Without
 * `offline_access` clients would get no refresh token, and users would have to sign in again every day.
 */
export function requestedScopes(enforceScopes: boolean, forTools: { scope?: string | undefined }[] = tools): string[] {
  if (!enforceScopes) return ["openid", "profile", "email", "offline_access"];
  return [...new Set(forTools.flatMap(({ scope }) => scope ?? [])), "offline_access"];
}

/** What is the same for every request. */
interface ServerOptions {
  resource: ProtectedResource;
  enforceScopes: boolean;
  store: TaskStore;
  /** Logs a line for the operator: a refusal, or a failure that is not the caller's fault. */
  warn: (line: string) => void;
}

/**
 * Returns the function that makes an MCP server for one request. Requests must not share a server, which could send one
 * client's answers to another (SDK advisory GHSA-345p-7cg4-v4c7). They share the schemas and the list of tools.
 *
 * Two handlers are set instead of calling `registerTool`, which drops the top-level `securitySchemes` that OpenAI
 * documents and would make every schema again for each request.
 */
export function createMcpServerFactory({ resource, enforceScopes, store, warn }: ServerOptions) {
  // By default the SDK makes a validator for each server, which takes 300 µs.
  const options = { instructions: INSTRUCTIONS, jsonSchemaValidator: new AjvJsonSchemaValidator() };
  const list = tools.map((tool) => {
    const securitySchemes = [{ type: "oauth2", scopes: requestedScopes(enforceScopes, [tool]) }];
    return { ...tool.listed, securitySchemes, _meta: { ...tool.listed._meta, securitySchemes } }; // _meta: older hosts
  });

  /** Whatever goes wrong is a tool error that the model can read, never an exception. */
  async function callTool(name: string, input: Record<string, unknown>, context: Context): Promise<mcp.CallToolResult> {
    const tool = tools.find(({ listed }) => listed.name === name);
    if (tool === undefined) {
      const names = tools.map(({ listed }) => listed.name).join(", ");
      return toolError(`There is no tool ${name.slice(0, 100).toWellFormed()}. There are ${names}`);
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
      return toolError(`${name} failed, and the server's log says why. Try again, but first look whether it was done`);
    }
  }

  return (caller: Caller) => {
    const mcpServer = new McpServer(SERVER_INFO, options);
    const { server } = mcpServer;
    server.registerCapabilities({ tools: {} }); // as an option, it would make McpServer declare listChanged, too
    server.setRequestHandler(mcp.ListToolsRequestSchema, () => ({ tools: list }));
    server.setRequestHandler(
      mcp.CallToolRequestSchema,
      ({ params }, { signal }) => callTool(params.name, params.arguments ?? {}, { caller, store, signal }),
    );
    return mcpServer;
  };
}

function toolError(text: string): mcp.CallToolResult {
  return { isError: true, content: [{ type: "text", text }] };
}

/**
 * A refusal in the form that OpenAI documents: ChatGPT then offers to sign in again. MCP 2025-11-25 (Authorization,
 * Scope Challenge Handling) has HTTP 403 instead, but clients of the SDK do not read the body of a 403. The challenge
 * names the scopes of all tools: a client that asked for the missing one alone would lose the others.
 */
function insufficientScope(scope: string, resource: ProtectedResource): mcp.CallToolResult {
  const text = `This tool needs the permission ${scope}, which the token does not grant: README, Permissions per tool`;
  const header = challenge(resource, { error: "insufficient_scope", error_description: text });
  return { ...toolError(text), _meta: { "mcp/www_authenticate": [header] } };
}
