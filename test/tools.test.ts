/** The tool table: what each tool takes and gives, and whose tasks it reaches. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, before, test } from "node:test";
import { CallToolResultSchema } from "@modelcontextprotocol/sdk/types.js";
import type { CallToolResult, Tool } from "@modelcontextprotocol/sdk/types.js";
import type { JsonSchemaType } from "@modelcontextprotocol/sdk/validation";
import { AjvJsonSchemaValidator } from "@modelcontextprotocol/sdk/validation/ajv";
import type { Task, TaskStore } from "../tools.ts";
import { logOf, post, startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

/** As the JSON has it: the SDK's client drops top-level properties that it does not know. */
interface ListedTool extends Omit<Tool, "outputSchema"> {
  outputSchema: JsonSchemaType;
  securitySchemes: { type: string; scopes: string[] }[];
  _meta: Record<string, unknown>;
}
type Input = Record<string, unknown>;

let tenant: Tenant;
let server: RunningServer;
let enforcing: RunningServer;
let tools: ListedTool[];
/** By the name of a tool: throws when structured content does not fit the output schema that is listed. */
const checks = new Map<string, (content: unknown) => void>();

before(async () => {
  tenant = await startTenant();
  server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  enforcing = await startServer({ AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true" });
  tools = await (await newUser()).listTools();
  const ajv = new AjvJsonSchemaValidator();
  for (const { name, outputSchema } of tools) {
    const validate = ajv.getValidator(outputSchema);
    checks.set(name, (content) => assert.equal(validate(content).errorMessage, undefined, name));
  }
});

after(async () => {
  await server.close();
  await enforcing.close();
  await tenant.close();
});

/** What somebody new can do who is signed in with these claims. */
async function newUser(claims: Record<string, unknown> = {}, { url }: RunningServer = server) {
  const token = await tenant.sign({ aud: url, sub: `auth0|${randomUUID()}`, ...claims });

  async function send<Result>(method: string, params?: unknown): Promise<Result> {
    const { result, error } = await (await post(url, token, method, params)).json();
    assert.equal(error, undefined, JSON.stringify(error));
    return result;
  }
  const listTools = async () => (await send<{ tools: ListedTool[] }>("tools/list")).tools;
  const call = async (name: string, input?: unknown): Promise<CallToolResult> =>
    CallToolResultSchema.parse(await send("tools/call", { name, arguments: input }));
  /** The structured content of a call that succeeds, after a look at both forms of the result. */
  async function get<Content>(name: string, input?: unknown): Promise<Content> {
    const { isError, content: [text, ...more], structuredContent } = await call(name, input);
    assert.ok(!isError && text?.type === "text", JSON.stringify(text));
    assert.deepEqual([JSON.parse(text.text), ...more], [structuredContent]);
    checks.get(name)?.(structuredContent);
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
  return { send, listTools, call, get, fail, create, update, list };
}

/** The value and all that lies in it, as far as it is an object. */
function* objectsIn(value: unknown): Generator<Record<string, unknown>> {
  if (typeof value !== "object" || value === null) return;
  yield { ...value };
  for (const inner of Object.values(value)) yield* objectsIn(inner);
}

test("five tools are listed, each with all that a model and a client want to know", () => {
  assert.deepEqual(tools.map(({ name }) => name), [
    "get_profile",
    "list_tasks",
    "create_task",
    "update_task",
    "delete_task",
  ]);
  for (const { name, title, description, annotations } of tools) {
    assert.ok(title && description?.startsWith("Use this"), name);
    const hints = ["readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"];
    assert.deepEqual(Object.keys(annotations ?? {}).sort(), hints.sort(), name);
  }
  const readers = tools.filter(({ annotations }) => annotations?.readOnlyHint).map(({ name }) => name);
  assert.deepEqual(readers, ["get_profile", "list_tasks"]);
});

test("each tool says how to sign in at the top level, where OpenAI documents it, and in _meta", () => {
  for (const { name, securitySchemes, _meta } of tools) {
    const scopes = ["openid", "profile", "email", "offline_access"];
    assert.deepEqual(securitySchemes, [{ type: "oauth2", scopes }], name);
    assert.deepEqual(_meta.securitySchemes, securitySchemes, name);
  }
});

test("the listed schemas hold nothing that hosts choke on", () => {
  const formats = new Set<unknown>();
  for (const { name, inputSchema, outputSchema } of tools) {
    for (const schema of [...objectsIn(inputSchema), ...objectsIn(outputSchema)]) {
      assert.ok(!("$schema" in schema) && !("pattern" in schema), `${name} ${JSON.stringify(schema)}`);
      if (schema.type === "object") assert.equal(schema.additionalProperties, false, name);
      if ("format" in schema) formats.add(schema.format);
    }
    assert.equal(inputSchema.type, "object");
    assert.equal(outputSchema.type, "object");
  }
  assert.deepEqual([...formats], ["date-time"]);
});

test("the listed schemas tell the model which lengths are taken", () => {
  const { properties } = tools.find(({ name }) => name === "create_task")?.inputSchema ?? {};
  const lengths = Object.entries(properties ?? {}).map(([name, schema]) => {
    const [{ minLength, maxLength } = {}] = [...objectsIn(schema)].filter((one) => "maxLength" in one);
    return [name, minLength, maxLength];
  });
  assert.deepEqual(lengths, [
    ["title", 1, 200],
    ["notes", undefined, 4_000],
    ["due_at", undefined, undefined],
    ["idempotency_key", 1, 200],
  ]);
});

test("a stateless server does not say that it will report changes of the list", async () => {
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

test("a profile says who the user is and nothing else", async () => {
  const claims = { sub: "auth0|alice", name: "Alice", email: "a@example.com", email_verified: true, picture: "x" };
  const { get } = await newUser(claims);
  assert.deepEqual(await get("get_profile"), { id: "auth0|alice", name: "Alice", email: "a@example.com" });
});

test("a profile takes what an Action has put under a namespace", async () => {
  const namespaced = { "https://example.com/email": "a@example.com", "https://example.com/nickname": "al" };
  const { get } = await newUser({ sub: "auth0|alice", ...namespaced });
  assert.deepEqual(await get("get_profile"), { id: "auth0|alice", email: "a@example.com", nickname: "al" });
});

test("a token with nothing but a subject is enough for a profile", async () => {
  const { get } = await newUser({ sub: "machine@clients", scope: undefined });
  assert.deepEqual(await get("get_profile"), { id: "machine@clients" });
});

test("a created task is listed as it was given", async () => {
  const { create, list } = await newUser();
  const created = await create({ title: " Buy milk ", notes: "Two litres", due_at: "2026-12-01T09:00:00+01:00" });
  const { id, created_at, updated_at, ...rest } = created;
  assert.deepEqual(rest, {
    title: "Buy milk",
    notes: "Two litres",
    status: "todo",
    due_at: "2026-12-01T08:00:00.000Z",
  });
  assert.match(id, /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/);
  assert.equal(new Date(created_at).toISOString(), created_at);
  assert.equal(updated_at, created_at);
  assert.deepEqual(await list(), { tasks: [created] });
});

test("what is not set is null", async () => {
  const { create } = await newUser();
  const { notes, due_at } = await create({ title: "Bare" });
  assert.deepEqual({ notes, due_at }, { notes: null, due_at: null });
});

test("the list is newest first, in pages, and can be filtered by status", async () => {
  const { create, update, list } = await newUser();
  const ids: string[] = [];
  for (let n = 1; n <= 5; n++) ids.unshift((await create({ title: `Task ${n}` })).id);

  const first = await list({ limit: 2 });
  const second = await list({ limit: 2, cursor: first.next_cursor });
  const third = await list({ limit: 2, cursor: second.next_cursor });
  assert.deepEqual([first, second, third].flatMap(({ tasks }) => tasks.map(({ id }) => id)), ids);
  assert.equal(third.next_cursor, undefined);

  await update({ id: ids[3], status: "done" });
  assert.deepEqual((await list({ status: "done" })).tasks.map(({ id }) => id), [ids[3]]);
  assert.equal((await list({ status: "todo", limit: 4 })).next_cursor, undefined);
});

test("a page holds 20 tasks unless asked otherwise, and with the longest notes under 100,000 characters", async () => {
  const { create, call, list } = await newUser();
  for (let n = 1; n <= 21; n++) await create({ title: "x".repeat(200), notes: "x".repeat(4_000) });
  const { tasks, next_cursor } = await list();
  assert.equal(tasks.length, 20);
  assert.equal((await list({ cursor: next_cursor })).tasks.length, 1);
  const { content: [text] } = await call("list_tasks");
  assert.ok(text?.type === "text" && text.text.length < 100_000, "too long");
});

test("a page ends sooner where JSON makes its text longer, and loses nothing", async () => {
  const { create, call, list } = await newUser();
  for (let n = 1; n <= 21; n++) await create({ title: `${n}`, notes: "\n".repeat(2_000) + "\u0001".repeat(2_000) });
  const { content: [text] } = await call("list_tasks", { limit: 100 });
  assert.ok(text?.type === "text" && text.text.length < 100_000, "too long");
  const titles: string[] = [];
  for (let page = await list();; page = await list({ cursor: page.next_cursor })) {
    titles.push(...page.tasks.map(({ title }) => title));
    if (page.next_cursor === undefined) break;
  }
  assert.deepEqual(titles, Array.from({ length: 21 }, (_, index) => `${21 - index}`));
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
  const tasks = [await create({ title: "First", ...unset }), await create({ title: "Second", ...unset })].reverse();
  assert.deepEqual(await list(null), { tasks });
  assert.deepEqual(await list({ status: null, limit: null, cursor: null }), { tasks });
  await get("get_profile", null);

  const { updated_at: _, ...task } = await create({ title: "Third", notes: "Keep" });
  const { updated_at: __, ...same } = await update({ id: task.id, title: null, status: null });
  assert.deepEqual(same, task);
  assert.match(await fail("create_task", { title: null }), /^title: /);
  assert.match(await fail("create_task", null), /^title: /);
});

test("what a tool does not know is ignored: some hosts send fields of their own", async () => {
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

test("the same idempotency key gives the same task back, until it is deleted", async () => {
  const { create, get, list } = await newUser();
  const first = await create({ title: "Once", idempotency_key: "k" });
  assert.deepEqual(await create({ title: "Again", notes: "Other", idempotency_key: "k" }), first);
  assert.equal((await list()).tasks.length, 1);
  await get("delete_task", { id: first.id });
  assert.notEqual((await create({ title: "Anew", idempotency_key: "k" })).id, first.id);
});

test("two users see only their own tasks, and share neither idempotency keys nor pages", async () => {
  const [alice, bob] = [await newUser(), await newUser()];
  const task = await alice.create({ title: "Alice's", idempotency_key: "k" });
  const other = await bob.create({ title: "Bob's", idempotency_key: "k" });
  const newer = await bob.create({ title: "Bob's, too" });
  assert.deepEqual((await alice.list()).tasks, [task]);
  assert.deepEqual((await bob.list()).tasks, [newer, other]);
  const { next_cursor } = await bob.list({ limit: 1 });
  assert.deepEqual((await alice.list({ cursor: next_cursor })).tasks, [task]);
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

test("bad input is a tool error that names the field and shows input that works", async () => {
  const { create, call, fail } = await newUser();
  const { id } = await create({ title: "Here" });
  const cases: [tool: string, input: Input, field: string][] = [
    ["create_task", {}, "title"],
    ["create_task", { title: "" }, "title"],
    ["create_task", { title: "   " }, "title"],
    ["create_task", { title: "x".repeat(201) }, "title"],
    ["create_task", { title: "a\0b" }, "title"],
    ["create_task", { title: "x", notes: "x".repeat(4001) }, "notes"],
    ["create_task", { title: "x", notes: "a\0b" }, "notes"],
    ["create_task", { title: "x", due_at: "tomorrow" }, "due_at"],
    ["create_task", { title: "x", due_at: "2026-12-01" }, "due_at"],
    ["create_task", { title: "x", due_at: "2026-12-01T09:00:00" }, "due_at"],
    ["create_task", { title: "x", due_at: "2026-13-01T09:00:00Z" }, "due_at"],
    ["create_task", { title: "x", idempotency_key: "" }, "idempotency_key"],
    ["create_task", { title: "x", idempotency_key: "a\0b" }, "idempotency_key"],
    ["list_tasks", { limit: 0 }, "limit"],
    ["list_tasks", { limit: 101 }, "limit"],
    ["list_tasks", { limit: 1.5 }, "limit"],
    ["list_tasks", { limit: "5" }, "limit"],
    ["list_tasks", { status: "late" }, "status"],
    ["list_tasks", { cursor: 2 }, "cursor"],
    ["update_task", { id, status: "late" }, "status"],
    ["update_task", { id, notes: "a\0b" }, "notes"],
    ["update_task", { title: "x" }, "id"],
    ["update_task", { id: null }, "id"],
    ["delete_task", { id: 7 }, "id"],
    ["delete_task", { id: "a\0b" }, "id"],
  ];
  const examples = new Map<string, unknown>();
  for (const [tool, input, field] of cases) {
    const [, named, example] = /^(\w+): .+\. Input that works: (\{.+\})$/.exec(await fail(tool, input)) ?? [];
    assert.equal(named, field, `${tool} ${JSON.stringify(input)}`);
    examples.set(tool, JSON.parse(example ?? ""));
  }
  assert.deepEqual([...examples.keys()].sort(), ["create_task", "delete_task", "list_tasks", "update_task"]);
  for (const [tool, input] of examples) {
    // The id of an example is nobody's, which is no fault of the input.
    assert.doesNotMatch(JSON.stringify(await call(tool, input)), /Input that works/, tool);
  }
});

test("an input error names every field that is wrong", async () => {
  const { fail } = await newUser();
  const text = await fail("create_task", { title: "", due_at: "tomorrow" });
  assert.match(text, /^title: .+; due_at: .+\. Input that works: /);
});

test("a cursor that is no next_cursor is refused in words that say where to get one", async () => {
  const { fail } = await newUser();
  const time = "2026-01-01T00:00:00.000Z";
  for (
    const cursor of ["", "2", "a_b", `${time}_b`, `b_${randomUUID()}`, `${time}_${randomUUID()}_`, "x".repeat(101)]
  ) {
    assert.match(await fail("list_tasks", { cursor }), /^cursor: .*next_cursor/, cursor);
  }
});

test("an unknown tool is a tool error that names the tools there are, whatever it is called", async () => {
  const { fail } = await newUser();
  for (const name of ["no_such_tool", "constructor", "__proto__", "x".repeat(10_000)]) {
    const text = await fail(name);
    for (const tool of tools) assert.ok(text.includes(tool.name), text);
    assert.ok(text.length < 1_000, `${text.length} characters`);
  }
});

test("with ENFORCE_SCOPES a tool asks for its own permission", async () => {
  const listed = await (await newUser({}, enforcing)).listTools();
  const scopes = listed.map(({ name, securitySchemes }) => [name, securitySchemes[0]?.scopes]);
  assert.deepEqual(scopes, [
    ["get_profile", ["offline_access"]],
    ["list_tasks", ["tasks:read", "offline_access"]],
    ["create_task", ["tasks:write", "offline_access"]],
    ["update_task", ["tasks:write", "offline_access"]],
    ["delete_task", ["tasks:write", "offline_access"]],
  ]);
  assert.deepEqual(listed.map(({ _meta }) => _meta.securitySchemes), listed.map((tool) => tool.securitySchemes));
});

test("with ENFORCE_SCOPES a missing permission is a tool error with a challenge that asks for all", async (t) => {
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

test("with ENFORCE_SCOPES a permission counts in either claim", async () => {
  const inScope = await newUser({ scope: "tasks:write" }, enforcing);
  await inScope.create({ title: "Allowed" });
  const inPermissions = await newUser({ scope: "openid", permissions: ["tasks:write"] }, enforcing);
  await inPermissions.create({ title: "Allowed" });
  assert.match(await inPermissions.fail("list_tasks"), /tasks:read/);
});

test("without ENFORCE_SCOPES a token that grants nothing is enough", async () => {
  const { create, list } = await newUser({ scope: undefined, permissions: [] });
  await create({ title: "Mine" });
  assert.equal((await list()).tasks.length, 1);
});

test("a store that fails is a line in the log, and a tool error without its inner workings", async (t) => {
  const failing = () => Promise.reject(new Error("SQLITE_IOERR at /secret/path"));
  const store: TaskStore = {
    list: failing,
    create: failing,
    update: failing,
    delete: failing,
    check: failing,
    close: () => Promise.resolve(),
  };
  const broken = await startServer({ AUTH0_DOMAIN: tenant.origin, LOG_LEVEL: "info" }, store);
  t.after(broken.close);
  const { fail, get } = await newUser({}, broken);
  const lines = logOf(t);
  for (const [name, input] of [["list_tasks", {}], ["create_task", { title: "x" }], ["delete_task", { id: "x" }]]) {
    const text = await fail(String(name), input);
    assert.match(text, /Try again/);
    assert.doesNotMatch(text, /SQLITE|secret/);
    assert.match(lines.shift() ?? "", new RegExp(`${name} failed: SQLITE_IOERR at /secret/path`));
  }
  assert.deepEqual(lines, []);
  await get("get_profile"); // needs no store
});
