/** What each tool takes and gives, and whose tasks it reaches. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, test } from "node:test";
import { type CallToolResult, CallToolResultSchema, type Tool } from "@modelcontextprotocol/sdk/types.js";
import type { JsonSchemaType } from "@modelcontextprotocol/sdk/validation";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/sdk/validation/ajv";
import { newTask, type Task, type TaskStore } from "../tools.ts";
import { logOf, post, type RunningServer, startServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";

/** As the JSON has it: the SDK's client drops top-level properties that it does not know. */
interface ListedTool extends Omit<Tool, "outputSchema"> {
  outputSchema: JsonSchemaType;
  securitySchemes: { type: string; scopes: string[] }[];
  _meta: Record<string, unknown>;
}
type Input = Record<string, unknown>;

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const enforcing = await startServer({ AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true" });
const tools = await (await newUser()).listTools();
const ajv = new AjvJsonSchemaValidator();
/** By the name of a tool: whether content fits the output schema that is listed. */
const validators = new Map(tools.map(({ name, outputSchema }) => [name, ajv.getValidator(outputSchema)]));

after(async () => {
  await server.close();
  await enforcing.close();
  await tenant.close();
});

/** A new user, signed in with these claims. */
async function newUser(claims: Record<string, unknown> = {}, { url }: RunningServer = server) {
  const subject = `auth0|${randomUUID()}`;
  const token = await tenant.sign({ aud: url, sub: subject, ...claims });

  async function send<Result>(method: string, params?: unknown): Promise<Result> {
    const { result, error } = await (await post(url, token, method, params)).json();
    assert.equal(error, undefined, JSON.stringify(error));
    return result;
  }
  const listTools = async () => (await send<{ tools: ListedTool[] }>("tools/list")).tools;
  const call = async (name: string, input?: unknown): Promise<CallToolResult> =>
    CallToolResultSchema.parse(await send("tools/call", { name, arguments: input }));
  /** The structured content of a call that succeeds. Checks the JSON text and the output schema, too. */
  async function get<Content>(name: string, input?: unknown): Promise<Content> {
    const { isError, content: [text, ...more], structuredContent } = await call(name, input);
    assert.ok(!isError && text?.type === "text", JSON.stringify(text));
    assert.deepEqual([JSON.parse(text.text), ...more], [structuredContent]);
    assert.equal(validators.get(name)?.(structuredContent).errorMessage, undefined, name);
    return structuredContent as Content;
  }
  /** The text of a call that fails. */
  async function fail(name: string, input?: unknown): Promise<string> {
    const { isError, content: [text], structuredContent } = await call(name, input);
    assert.equal(isError, true, `${name} ${JSON.stringify(input)}`);
    assert.equal(structuredContent, undefined);
    return text?.type === "text" ? text.text : assert.fail("no text");
  }
  const create = async (input: Input) => (await get<{ task: Task }>("create_task", input)).task;
  const update = async (input: Input) => (await get<{ task: Task }>("update_task", input)).task;
  const list = (input?: unknown) => get<{ tasks: Task[]; next_cursor?: string }>("list_tasks", input);
  return { subject, send, listTools, call, get, fail, create, update, list };
}

const newestFirst = (tasks: Task[]) => tasks.toSorted((a, b) => a.created_at + a.id < b.created_at + b.id ? 1 : -1);

/** The listed schemas of a tool's input, by field. */
function inputsOf(tool: string): Record<string, Record<string, unknown>> {
  const { properties = {} } = tools.find(({ name }) => name === tool)?.inputSchema ?? {};
  return Object.fromEntries(Object.entries(properties).map(([field, schema]) => [field, { ...schema }]));
}

/** The value, if it is an object, and all objects in it. */
function* objectsIn(value: unknown): Generator<Record<string, unknown>> {
  if (typeof value !== "object" || value === null) return;
  yield { ...value };
  for (const inner of Object.values(value)) yield* objectsIn(inner);
}

test("five tools are listed, each with its purpose and the hints by which hosts decide to ask the user", () => {
  const hints = ["readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"];
  const expected = {
    get_profile: [true, false, true, false],
    list_tasks: [true, false, true, false],
    create_task: [false, false, false, false],
    update_task: [false, true, true, false],
    delete_task: [false, true, true, false],
  };
  const withHints = (values: boolean[]) => Object.fromEntries(hints.map((hint, index) => [hint, values[index]]));
  const listed = tools.map(({ name, annotations }) => [name, annotations]);
  assert.deepEqual(listed, Object.entries(expected).map(([name, values]) => [name, withHints(values)]));
  for (const { name, title, description } of tools) assert.ok(title && description?.startsWith("Use this"), name);
});

test("each tool lists its securitySchemes at the top level, where OpenAI documents them, and in _meta", async () => {
  const signIn = ["openid", "profile", "email", "offline_access"];
  const [reading, writing] = [["tasks:read", "offline_access"], ["tasks:write", "offline_access"]];
  const enforced = [["offline_access"], reading, writing, writing, writing];
  const listedByEnforcing = await (await newUser({}, enforcing)).listTools();
  for (const [listed, scopes] of [[tools, tools.map(() => signIn)], [listedByEnforcing, enforced]] as const) {
    const expected = scopes.map((scopes) => [{ type: "oauth2", scopes }]);
    assert.deepEqual(listed.map(({ securitySchemes }) => securitySchemes), expected);
    assert.deepEqual(listed.map(({ _meta }) => _meta.securitySchemes), expected);
  }
});

test("the listed schemas use no keyword that hosts are known to reject", () => {
  const formats = new Set<unknown>();
  for (const { name, inputSchema, outputSchema } of tools) {
    for (const schema of [...objectsIn(inputSchema), ...objectsIn(outputSchema)]) {
      assert.ok(!("$schema" in schema) && !("pattern" in schema), `${name} ${JSON.stringify(schema)}`);
      assert.ok(!Array.isArray(schema.type), `${name} ${JSON.stringify(schema)}`);
      if ("anyOf" in schema) assert.deepEqual(Object.keys(schema), ["anyOf"], name); // hosts drop what is beside it
      if (schema.type === "object") assert.equal(schema.additionalProperties, false, name);
      if ("format" in schema) formats.add(schema.format);
    }
    assert.equal(inputSchema.type, "object");
    assert.equal(outputSchema.type, "object");
  }
  assert.deepEqual([...formats], ["date-time"]);
});

test("the listed schemas tell the model which lengths are accepted", () => {
  const lengths = Object.entries({ ...inputsOf("update_task"), ...inputsOf("create_task") }).map(([name, schema]) => {
    return [name, schema.minLength, schema.maxLength];
  });
  assert.deepEqual(lengths, [
    ["id", 1, 100],
    ["title", 1, 200],
    ["notes", undefined, 2_000],
    ["due_at", undefined, undefined],
    ["status", undefined, undefined],
    ["idempotency_key", 1, 200],
  ]);
});

test("each listed input has one type, since hosts drop what has two, and null only where it clears the field", () => {
  for (const { name } of tools) {
    for (const [field, { anyOf, type }] of Object.entries(inputsOf(name))) {
      const mayBeNull = name === "update_task" && ["notes", "due_at"].includes(field);
      const expected = mayBeNull ? [inputsOf("create_task")[field], { type: "null" }] : undefined;
      assert.deepEqual([anyOf, typeof type], [expected, mayBeNull ? "undefined" : "string"], `${name} ${field}`);
    }
  }
});

test("the server, which is stateless, does not promise to report changes of the tool list", async () => {
  const { send } = await newUser();
  const { capabilities } = await send<{ capabilities: unknown }>("initialize", {
    protocolVersion: "2025-11-25",
    capabilities: {},
    clientInfo: { name: "test", version: "1.0.0" },
  });
  assert.deepEqual(capabilities, { tools: {} });
});

test("the profile tool is marked for ChatGPT, takes nothing and has the schema that OpenAI publishes", () => {
  const [profile, ...more] = tools.filter(({ _meta }) => _meta["openai/profile"] === true);
  assert.deepEqual([profile?.name, more], ["get_profile", []]);
  assert.deepEqual(profile?.inputSchema, { type: "object", properties: {}, additionalProperties: false });
  assert.deepEqual(profile?.outputSchema, {
    type: "object",
    properties: {
      id: { type: "string", minLength: 1 },
      name: { type: "string" },
      email: { type: "string" },
      nickname: { type: "string" },
    },
    required: ["id"],
    additionalProperties: false,
  });
});

test("a profile says who the user is and nothing else, also from claims under an Action's namespace", async () => {
  const alice = { sub: "auth0|alice", email: "a@example.com" };
  const namespaced = { "https://example.com/email": "a@example.com", "https://example.com/nickname": "al" };
  const profiles: [claims: Record<string, unknown>, profile: Record<string, unknown>][] = [
    [{ ...alice, name: "Alice", email_verified: true, picture: "x" }, { email: "a@example.com", name: "Alice" }],
    [{ sub: "auth0|alice", ...namespaced }, { email: "a@example.com", nickname: "al" }],
    [{ sub: "machine@clients", scope: undefined }, {}],
  ];
  for (const [claims, profile] of profiles) {
    assert.deepEqual(await (await newUser(claims)).get("get_profile"), { id: claims.sub, ...profile });
  }
});

test("a created task is listed as it was given, with null for notes and due_at that were not", async () => {
  const { create, list } = await newUser();
  const created = await create({ title: " Buy milk ", notes: "Two litres", due_at: "2026-12-01T09:00:00+01:00" });
  const { id, created_at, updated_at, ...rest } = created;
  const due_at = "2026-12-01T08:00:00.000Z";
  assert.deepEqual(rest, { title: "Buy milk", notes: "Two litres", status: "todo", due_at });
  assert.match(id, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
  assert.equal(new Date(created_at).toISOString(), created_at);
  assert.equal(updated_at, created_at);
  assert.deepEqual(await list(), { tasks: [created] });
  const bare = await create({ title: "Bare" });
  assert.deepEqual([bare.notes, bare.due_at], [null, null]);
});

test("the list is newest first, in pages, and can be filtered by status", async () => {
  const { create, update, list } = await newUser();
  const created: Task[] = [];
  for (let number = 1; number <= 5; number++) created.push(await create({ title: `Task ${number}` }));
  const expected = newestFirst(created);

  const first = await list({ limit: 2 });
  const second = await list({ limit: 2, cursor: first.next_cursor });
  const third = await list({ limit: 2, cursor: second.next_cursor });
  assert.deepEqual([first, second, third].flatMap(({ tasks }) => tasks), expected);
  assert.equal(third.next_cursor, undefined);

  const done = await update({ id: expected[3]?.id, status: "done" });
  assert.deepEqual(await list({ status: "done" }), { tasks: [done] });
  assert.equal((await list({ status: "todo", limit: 4 })).next_cursor, undefined);
});

test("a page holds 20 tasks by default, in under 100,000 characters whatever they contain", async () => {
  const { create, call, list } = await newUser();
  // Characters that JSON text escapes, which makes it longest.
  const [title, notes] = ['"'.repeat(200), '\n\\"\t'.repeat(500)];
  for (let count = 0; count < 21; count++) await create({ title, notes, due_at: "2026-12-01T09:00:00Z" });
  const { tasks, next_cursor } = await list();
  assert.deepEqual([tasks.length, tasks[0]?.notes], [20, notes]);
  assert.equal((await list({ cursor: next_cursor })).tasks.length, 1);
  const { content: [text] } = await call("list_tasks");
  assert.ok(text?.type === "text" && text.text.length < 100_000, "too long");
});

test("a task of an earlier release, with longer notes than are accepted now, can be listed and changed", async () => {
  const { subject, list, update } = await newUser();
  const old = newTask({ title: "Old", notes: `${"x".repeat(3_999)}\u0001`, due_at: null });
  await server.store.create(subject, old);
  assert.deepEqual(await list(), { tasks: [old] });
  const { updated_at, ...rest } = await update({ id: old.id, status: "done" });
  assert.deepEqual({ ...rest, updated_at }, { ...old, status: "done", updated_at });
});

test("an update changes what it names and clears notes and due_at that it sets to null", async () => {
  const { create, update, list } = await newUser();
  const task = await create({ title: "Old", notes: "Keep", due_at: "2027-01-01T00:00:00Z" });
  const renamed = await update({ id: task.id, title: "New", status: "in_progress" });
  assert.deepEqual(renamed, { ...task, title: "New", status: "in_progress", updated_at: renamed.updated_at });
  const cleared = await update({ id: task.id, notes: null, due_at: null });
  assert.deepEqual(cleared, { ...renamed, notes: null, due_at: null, updated_at: cleared.updated_at });
  assert.deepEqual((await list()).tasks, [cleared]);
});

test("null for an optional input counts as left out", async () => {
  const { create, update, list, get, fail } = await newUser();
  const unset = { notes: null, due_at: null, idempotency_key: null };
  const tasks = newestFirst([await create({ title: "A", ...unset }), await create({ title: "B", ...unset })]);
  assert.deepEqual(await list(null), { tasks });
  assert.deepEqual(await list({ status: null, limit: null, cursor: null }), { tasks });
  await get("get_profile", null);

  const { updated_at: _, ...task } = await create({ title: "Third", notes: "Keep" });
  const { updated_at: __, ...changed } = await update({ id: task.id, title: null, status: "done" });
  assert.deepEqual(changed, { ...task, status: "done" });
  assert.match(await fail("create_task", { title: null }), /^title: /);
  assert.match(await fail("create_task", null), /^title: /);
});

test("a field that a tool does not know is ignored, since some hosts add their own", async () => {
  const { create, list } = await newUser();
  const task = await create({ title: "Here", sessionId: "host's own", owner: "auth0|another", id: "mine" });
  for (const name of ["sessionId", "constructor", "toString", "__proto__"]) {
    // Parsed, since in a literal __proto__ would set the prototype.
    for (const value of ['"x"', "null"]) {
      assert.deepEqual((await list(JSON.parse(`{ "${name}": ${value} }`))).tasks, [task], `${name}: ${value}`);
    }
  }
});

test("a deleted task is gone", async () => {
  const { create, get, list, fail } = await newUser();
  const { id } = await create({ title: "Short-lived" });
  assert.deepEqual(await get("delete_task", { id }), { deleted: id });
  assert.deepEqual(await list(), { tasks: [] });
  assert.match(await fail("delete_task", { id }), new RegExp(`^id: no task has the id ${id}.*list_tasks`));
});

test("a call that is repeated with its idempotency key returns the same task, until that is deleted", async () => {
  const { create, get, list } = await newUser();
  const first = await create({ title: "Once", idempotency_key: "k" });
  assert.deepEqual(await create({ title: " Once ", notes: "Other", idempotency_key: "k" }), first);
  assert.deepEqual(await list(), { tasks: [first] });
  await get("delete_task", { id: first.id });
  assert.notEqual((await create({ title: "Once", idempotency_key: "k" })).id, first.id);
});

test("one idempotency key for two titles is a tool error, so that no task is lost silently", async () => {
  const { create, update, list, fail } = await newUser();
  const first = await create({ title: "Milk", idempotency_key: "k" });
  const refused = await fail("create_task", { title: "Bread", idempotency_key: "k" });
  assert.match(refused, /^idempotency_key: .*"Milk".*another/);
  assert.deepEqual(await list(), { tasks: [first] });

  // Compared with the title that the task has now.
  const renamed = await update({ id: first.id, title: "Bread" });
  assert.deepEqual(await create({ title: "Bread", idempotency_key: "k" }), renamed);
  assert.match(await fail("create_task", { title: "Milk", idempotency_key: "k" }), /^idempotency_key: .*"Bread"/);
});

test("an update that changes nothing is a tool error that names the fields it takes", async () => {
  const { create, list, fail } = await newUser();
  const task = await create({ title: "Here" });
  for (const input of [{}, { completed: true }, { title: null, status: null }]) {
    assert.match(await fail("update_task", { id: task.id, ...input }), /title, notes, due_at and status/);
  }
  assert.deepEqual(await list(), { tasks: [task] });
});

test("two users see only their own tasks, and share no idempotency keys", async () => {
  const [alice, bob] = [await newUser(), await newUser()];
  const task = await alice.create({ title: "Alice's", idempotency_key: "k" });
  const other = await bob.create({ title: "Bob's", idempotency_key: "k" });
  const newer = await bob.create({ title: "Bob's, too" });
  assert.deepEqual((await alice.list()).tasks, [task]);
  assert.deepEqual((await bob.list()).tasks, newestFirst([newer, other]));
});

test("another user's task answers exactly as an unknown one does", async () => {
  const [alice, bob] = [await newUser(), await newUser()];
  const { id } = await alice.create({ title: "Alice's" });
  const unknown = randomUUID();
  for (const [tool, input] of [["update_task", { title: "Mine" }], ["delete_task", {}]] as const) {
    const theirs = await bob.call(tool, { ...input, id });
    const nobodys = await bob.call(tool, { ...input, id: unknown });
    assert.equal(theirs.isError, true);
    assert.deepEqual(JSON.parse(JSON.stringify(theirs).replaceAll(id, unknown)), nobodys);
  }
  assert.equal((await alice.list()).tasks[0]?.title, "Alice's");
});

/** Calls with one field wrong at a time. Gives the field, its listed schema and the answer. */
async function* spoil(cases: Record<string, Record<string, unknown[]>>) {
  const { create, fail } = await newUser();
  const good = { id: (await create({ title: "Here" })).id, title: "x" };
  for (const [tool, fields] of Object.entries(cases)) {
    for (const [field, values] of Object.entries(fields)) {
      for (const value of values) {
        yield { field, takes: inputsOf(tool)[field], text: await fail(tool, { ...good, [field]: value }) };
      }
    }
  }
}

test("bad input is a tool error that names each field that is wrong, and shows what it takes", async () => {
  const time = "2026-01-01T00:00:00.000Z";
  const cursors = ["", "2", "a_b", `${time}_b`, `b_${randomUUID()}`, `${time}_${randomUUID()}_`, "x".repeat(101)];
  const cases = {
    create_task: {
      title: [undefined, null, 7, "", "   ", "x".repeat(201)],
      notes: ["x".repeat(2_001)],
      due_at: ["tomorrow", "2026-12-01", "2026-12-01T09:00:00", "2026-13-01T09:00:00Z", "9999-12-31T23:59:59-01:00"],
      idempotency_key: ["", "x".repeat(201)],
    },
    list_tasks: { limit: [0, 101, 1.5, "5"], status: ["late"], cursor: [2, ...cursors] },
    update_task: { id: [undefined, null, "x".repeat(101)], status: ["late"], due_at: ["tomorrow"] },
    delete_task: { id: ["", "x".repeat(101), 7] },
  };
  for await (const { field, takes, text } of spoil(cases)) {
    const [, named, shown = "{}"] = /^(\w+): .+\. It takes (\{.+\})$/.exec(text) ?? [];
    assert.deepEqual([named, JSON.parse(shown)], [field, takes], text);
  }
  const { fail } = await newUser();
  assert.match(await fail("create_task", { title: "", due_at: "tomorrow" }), /^title: .+\ndue_at: .+$/);
});

test("a control character or half a surrogate pair, which databases and JSON readers refuse, is refused", async () => {
  const texts = ["a\0b", "\u0001", "a\u000bb", "\u000c", "a\u001f", "half \ud83d", "\ude00 half", "\ude00\ud83d"];
  const cases = {
    create_task: { title: texts, notes: texts, idempotency_key: texts },
    update_task: { title: texts, notes: texts, id: texts },
    delete_task: { id: texts },
  };
  for await (const { field, text } of spoil(cases)) {
    assert.match(text, new RegExp(`^${field}: Holds (half a surrogate pair|a control character below U\\+0020)`));
  }
  const { create } = await newUser();
  const whole = "tab\t line\n end\r\n next line\u0085 delete\u007f 😀";
  const { title, notes } = await create({ title: whole, notes: whole, idempotency_key: whole });
  assert.deepEqual([title, notes], [whole, whole]);
});

test("a call of an unknown tool is a tool error that lists the known ones, whatever its name", async () => {
  const { fail } = await newUser();
  for (const name of ["no_such_tool", "constructor", "__proto__", "x".repeat(10_000), `${"x".repeat(99)}😀`]) {
    const text = await fail(name);
    for (const tool of tools) assert.ok(text.includes(tool.name), text);
    assert.ok(text.length < 1_000, `${text.length} characters`);
    assert.ok(text.isWellFormed(), "Half a surrogate pair");
  }
});

test("with ENFORCE_SCOPES a missing permission is a tool error with a challenge for all scopes", async (t) => {
  const env = { AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true", LOG_LEVEL: "info" };
  const [log, enforcing] = [logOf(t), await startServer(env)];
  t.after(enforcing.close);
  const { get, call, list } = await newUser({ scope: "tasks:read offline_access" }, enforcing);
  await get("get_profile");
  for (const name of ["create_task", "update_task", "delete_task"]) {
    const { isError, content: [text], _meta } = await call(name, { title: "Not allowed", id: randomUUID() });
    assert.equal(isError, true);
    assert.match(text?.type === "text" ? text.text : "", /tasks:write/);
    const [challenge, ...more] = _meta?.["mcp/www_authenticate"] as string[];
    assert.deepEqual(more, []);
    const metadata = new URL("/.well-known/oauth-protected-resource/mcp", enforcing.url);
    const form = new RegExp(
      `^Bearer error="insufficient_scope", error_description="[^"]*tasks:write[^"]*", ` +
        `resource_metadata="${metadata}", scope="tasks:read tasks:write offline_access"$`,
    );
    assert.match(challenge ?? "", form);
    assert.match(log.pop() ?? "", new RegExp(`${name} refused to auth0\\|.*tasks:write\n$`));
  }
  assert.deepEqual(await list(), { tasks: [] });
});

test("with ENFORCE_SCOPES a permission counts in either claim, and without it none is needed", async () => {
  await (await newUser({ scope: "tasks:write" }, enforcing)).create({ title: "Allowed" });
  const inPermissions = await newUser({ scope: "openid", permissions: ["tasks:write"] }, enforcing);
  await inPermissions.create({ title: "Allowed" });
  assert.match(await inPermissions.fail("list_tasks"), /tasks:read/);
  const withNone = await newUser({ scope: undefined, permissions: [] });
  const task = await withNone.create({ title: "Allowed" });
  assert.deepEqual(await withNone.list(), { tasks: [task] });
});

test("a failure of the store is a line in the log, and a tool error without internal details", async (t) => {
  const failure = new Error("SQLITE_IOERR at /secret/tools.ts", { cause: new Error("secret") });
  const store: TaskStore = {
    list() {
      throw failure;
    },
    create: () => Promise.reject(failure),
    update: () => Promise.reject(undefined),
    delete: () => Promise.reject("SQLITE_IOERR"),
    check: () => Promise.reject(failure),
    close: () => Promise.resolve(),
  };
  const broken = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" }, store);
  t.after(broken.close);
  const { fail, get } = await newUser({}, broken);
  const lines = logOf(t);
  const failures = {
    list_tasks: "SQLITE_IOERR at /secret/tools.ts",
    create_task: "SQLITE_IOERR at /secret/tools.ts",
    update_task: "undefined",
    delete_task: "SQLITE_IOERR",
  };
  for (const [tool, failure] of Object.entries(failures)) {
    const text = await fail(tool, { id: "x", title: "x" });
    assert.match(text, new RegExp(`^${tool} failed, and the server's log says why\\. Try again`));
    assert.doesNotMatch(text, /SQLITE|secret|\n/);
    assert.match(lines.shift() ?? "", new RegExp(`${tool} failed: ${failure}`));
  }
  assert.deepEqual(lines, []);
  assert.equal((await fetch(new URL("/health", broken.url))).status, 503);
  await get("get_profile"); // needs no store
});
