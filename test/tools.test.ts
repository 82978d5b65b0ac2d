/** The tool table: what each tool takes and gives, and whose tasks it reaches. */
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { after, before, test } from "node:test";
import type { TestContext } from "node:test";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import type { Transport } from "@modelcontextprotocol/sdk/shared/transport.js";
import { CallToolResultSchema } from "@modelcontextprotocol/sdk/types.js";
import type { CallToolResult } from "@modelcontextprotocol/sdk/types.js";
import type { Task } from "../tools.ts";
import { post, startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { startTenant } from "./support/tenant.ts";
import type { Tenant } from "./support/tenant.ts";

let tenant: Tenant;
let server: RunningServer;
let enforcing: RunningServer;

before(async () => {
  tenant = await startTenant();
  server = await startServer({ AUTH0_DOMAIN: tenant.origin });
  enforcing = await startServer({ AUTH0_DOMAIN: tenant.origin, ENFORCE_SCOPES: "true" });
});

after(async () => {
  await server.close();
  await enforcing.close();
  await tenant.close();
});

/** A client of the SDK, which validates results against the output schemas, signed in as a user of its own. */
async function connect(t: TestContext, claims: Record<string, unknown> = {}, { url } = server) {
  const token = await tenant.sign({ aud: url, sub: `auth0|${randomUUID()}`, ...claims });
  const client = new Client({ name: "test", version: "1.0.0" });
  const headers = { authorization: `Bearer ${token}` };
  await client.connect(
    new StreamableHTTPClientTransport(new URL(url), { requestInit: { headers } }) as Transport,
  );
  t.after(() => client.close());
  const { tools } = await client.listTools();

  const call = async (name: string, input: Record<string, unknown> = {}): Promise<CallToolResult> =>
    CallToolResultSchema.parse(await client.callTool({ name, arguments: input }));
  /** The structured content of a call that succeeds. The text is the same, for hosts that read only that. */
  async function get<Content>(name: string, input?: Record<string, unknown>): Promise<Content> {
    const { isError, content: [text], structuredContent } = await call(name, input);
    assert.ok(!isError && text?.type === "text", JSON.stringify(text));
    assert.deepEqual(JSON.parse(text.text), structuredContent);
    return structuredContent as Content;
  }
  const create = async (input: Record<string, unknown>) => (await get<{ task: Task }>("create_task", input)).task;
  const update = async (input: Record<string, unknown>) => (await get<{ task: Task }>("update_task", input)).task;
  const list = (input?: Record<string, unknown>) => get<{ tasks: Task[]; next_cursor?: string }>("list_tasks", input);
  /** The text of a call that fails. */
  async function fail(name: string, input?: Record<string, unknown>): Promise<string> {
    const { isError, content: [text], structuredContent } = await call(name, input);
    assert.equal(isError, true, `${name} ${JSON.stringify(input)}`);
    assert.equal(structuredContent, undefined);
    return text?.type === "text" ? text.text : assert.fail("no text");
  }
  return { client, tools, call, get, create, update, list, fail };
}

/** The reply to a message as it goes over the wire: the SDK's client drops what it does not know. */
async function ask(method: string, params: unknown, { url } = server) {
  const token = await tenant.sign({ aud: url, sub: `auth0|${randomUUID()}` });
  return await (await post(url, token, method, params)).json();
}

test("five tools are listed, each with all that a model and a client want to know", async () => {
  const { result: { tools } } = await ask("tools/list", {});
  assert.deepEqual(tools.map(({ name }: { name: string }) => name), [
    "get_profile",
    "list_tasks",
    "create_task",
    "update_task",
    "delete_task",
  ]);
  for (const tool of tools) {
    const { name, title, description, inputSchema, outputSchema, annotations, securitySchemes, _meta } = tool;
    assert.ok(title && description.startsWith("Use this"), name);
    assert.deepEqual([inputSchema.type, inputSchema.additionalProperties, outputSchema.type], [
      "object",
      false,
      "object",
    ]);
    const hints = ["readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"];
    assert.deepEqual(Object.keys(annotations).sort(), hints.sort(), name);
    assert.deepEqual(securitySchemes, [{ type: "oauth2", scopes: ["openid", "profile", "email", "offline_access"] }]);
    assert.deepEqual(_meta.securitySchemes, securitySchemes);
    assert.ok(_meta["openai/toolInvocation/invoking"] && _meta["openai/toolInvocation/invoked"], name);
    assert.equal(annotations.readOnlyHint, ["get_profile", "list_tasks"].includes(name));
  }
});

test("the listed schemas hold nothing that a host cannot read", async () => {
  const walk = (value: unknown): [string, unknown][] =>
    typeof value !== "object" || value === null
      ? []
      : Object.entries(value).flatMap(([name, inner]) => [[name, inner], ...walk(inner)] as [string, unknown][]);
  const { result: { tools } } = await ask("tools/list", {});
  const entries = tools.flatMap(({ inputSchema, outputSchema }: Record<string, unknown>) => [
    ...walk(inputSchema),
    ...walk(outputSchema),
  ]);
  assert.ok(entries.length > 100);
  const unread = entries.filter(([name, value]: [string, unknown]) =>
    name === "$schema" || name === "pattern" || (name === "format" && value !== "date-time")
  );
  assert.deepEqual(unread, []);
});

test("a stateless server does not promise to say when its list changes", async () => {
  const { result } = await ask("initialize", {
    protocolVersion: "2025-11-25",
    capabilities: {},
    clientInfo: { name: "test", version: "1" },
  });
  assert.deepEqual(result.capabilities, { tools: {} });
  assert.ok(result.instructions.length < 512); // what ChatGPT reads of them
});

test("the profile tool is marked for ChatGPT, takes nothing and says only who the user is", async (t) => {
  const { tools, get } = await connect(t, {
    sub: "auth0|alice",
    name: "Alice",
    email: "a@example.com",
    picture: "x",
  });
  const profile = tools.find(({ _meta }) => _meta?.["openai/profile"] === true);
  assert.equal(profile?.name, "get_profile");
  assert.deepEqual(profile.inputSchema, { type: "object", properties: {}, additionalProperties: false });
  assert.deepEqual(profile.outputSchema, {
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
  assert.deepEqual(await get("get_profile"), { id: "auth0|alice", name: "Alice", email: "a@example.com" });
});

test("the profile takes what an Action has put under a namespace", async (t) => {
  const claims = {
    sub: "auth0|alice",
    "https://example.com/email": "a@example.com",
    "https://example.com/nickname": "al",
  };
  const { get } = await connect(t, claims);
  assert.deepEqual(await get("get_profile"), { id: "auth0|alice", email: "a@example.com", nickname: "al" });
});

test("a token with nothing but a subject is enough for a profile", async (t) => {
  const { get } = await connect(t, { sub: "machine@clients", scope: undefined });
  assert.deepEqual(await get("get_profile"), { id: "machine@clients" });
});

test("a created task is listed as it was given", async (t) => {
  const { create, list } = await connect(t);
  const created = await create({
    title: " Buy milk ",
    notes: "Two litres",
    due_at: "2026-12-01T09:00:00+01:00",
  });
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

test("what is not set is null", async (t) => {
  const { create } = await connect(t);
  const { notes, due_at } = await create({ title: "Bare" });
  assert.deepEqual({ notes, due_at }, { notes: null, due_at: null });
});

test("the list is newest first, in pages, and can be filtered by status", async (t) => {
  const { create, update, list } = await connect(t);
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

test("an update changes what it names and clears what it sets to null", async (t) => {
  const { create, update, list } = await connect(t);
  const task = await create({ title: "Old", notes: "Keep", due_at: "2027-01-01T00:00:00Z" });
  const renamed = await update({ id: task.id, title: "New", status: "in_progress" });
  assert.deepEqual(renamed, { ...task, title: "New", status: "in_progress", updated_at: renamed.updated_at });
  const cleared = await update({ id: task.id, notes: null, due_at: null });
  assert.deepEqual(cleared, { ...renamed, notes: null, due_at: null, updated_at: cleared.updated_at });
  assert.deepEqual((await list()).tasks, [cleared]);
});

test("a deleted task is gone", async (t) => {
  const { create, get, list, fail } = await connect(t);
  const { id } = await create({ title: "Short-lived" });
  assert.deepEqual(await get("delete_task", { id }), { deleted: id });
  assert.deepEqual(await list(), { tasks: [] });
  assert.match(await fail("delete_task", { id }), new RegExp(`no task has the id ${id}`));
});

test("the same idempotency key gives the same task back, until it is deleted", async (t) => {
  const { create, get, list } = await connect(t);
  const first = await create({ title: "Once", idempotency_key: "k" });
  assert.deepEqual(await create({ title: "Again", notes: "Other", idempotency_key: "k" }), first);
  assert.equal((await list()).tasks.length, 1);
  await get("delete_task", { id: first.id });
  assert.notEqual((await create({ title: "Anew", idempotency_key: "k" })).id, first.id);
});

test("two users see only their own tasks, and share no idempotency keys", async (t) => {
  const [alice, bob] = [await connect(t), await connect(t)];
  const task = await alice.create({ title: "Alice's", idempotency_key: "k" });
  const other = await bob.create({ title: "Bob's", idempotency_key: "k" });
  assert.deepEqual((await alice.list()).tasks, [task]);
  assert.deepEqual((await bob.list()).tasks, [other]);
});

test("another user's task answers exactly as an unknown one does", async (t) => {
  const [alice, bob] = [await connect(t), await connect(t)];
  const { id } = await alice.create({ title: "Alice's" });
  const unknown = randomUUID();
  for (const tool of ["update_task", "delete_task"]) {
    const [theirs, nobodys] = [
      await bob.fail(tool, { id, title: "Mine" }),
      await bob.fail(tool, { id: unknown }),
    ];
    assert.equal(theirs.replace(id, ""), nobodys.replace(unknown, ""));
  }
  assert.equal((await alice.list()).tasks.length, 1);
});

test("a page has twenty tasks, and stays short enough for hosts that cut at 100,000 characters", async (t) => {
  const { create, call } = await connect(t);
  for (let n = 0; n < 21; n++) await create({ title: "x".repeat(200), notes: "x".repeat(4_000) });
  const { content: [text], structuredContent } = await call("list_tasks");
  assert.equal((structuredContent as { tasks: Task[] }).tasks.length, 20);
  assert.ok(text?.type === "text" && text.text.length < 100_000);
});

test("null for what is optional counts as left out, except where it means none", async (t) => {
  const { create, update, list } = await connect(t);
  const task = await create({ title: "Here", notes: "Some", due_at: null, idempotency_key: null });
  assert.deepEqual(await list({ status: null, limit: null, cursor: null }), { tasks: [task] });
  const unchanged = await update({ id: task.id, title: null, status: null });
  assert.deepEqual(unchanged, { ...task, updated_at: unchanged.updated_at });
  assert.equal((await update({ id: task.id, notes: null })).notes, null);
  for (const input of [null, undefined]) {
    const { result } = await ask("tools/call", { name: "list_tasks", arguments: input });
    assert.deepEqual(result.structuredContent, { tasks: [] });
  }
});

test("bad input is a tool error that names the field, and shows input that works", async (t) => {
  const { create, call, fail } = await connect(t);
  const { id } = await create({ title: "Here" });
  const cases: [tool: string, input: Record<string, unknown>, field: string][] = [
    ["create_task", {}, "title"],
    ["create_task", { title: null }, "title"],
    ["create_task", { title: "" }, "title"],
    ["create_task", { title: "   " }, "title"],
    ["create_task", { title: "x".repeat(201) }, "title"],
    ["create_task", { title: "a\0b" }, "title"],
    ["create_task", { title: "x", notes: "x".repeat(4001) }, "notes"],
    ["create_task", { title: "x", notes: "\0" }, "notes"],
    ["create_task", { title: "x", due_at: "tomorrow" }, "due_at"],
    ["create_task", { title: "x", due_at: "2026-12-01T09:00:00" }, "due_at"],
    ["create_task", { title: "x", due_at: "2026-13-01T09:00:00Z" }, "due_at"],
    ["create_task", { title: "x", idempotency_key: "" }, "idempotency_key"],
    ["list_tasks", { limit: 0 }, "limit"],
    ["list_tasks", { limit: 101 }, "limit"],
    ["list_tasks", { limit: 1.5 }, "limit"],
    ["list_tasks", { status: "late" }, "status"],
    ["list_tasks", { cursor: "second page" }, "cursor"],
    ["update_task", { id, status: "late" }, "status"],
    ["update_task", { title: "x" }, "id"],
    ["delete_task", { id: 7 }, "id"],
    ["delete_task", { id: "\0" }, "id"],
  ];
  for (const [tool, input, field] of cases) {
    const text = await fail(tool, input);
    const [, example = ""] = new RegExp(`\\b${field}: .*Input that works: (.*)$`).exec(text) ?? assert.fail(text);
    // Right by the schema; a task with the example's id need not be there.
    const { content: [answer], isError } = await call(tool, JSON.parse(example));
    assert.ok(!isError || (answer?.type === "text" && answer.text.startsWith("id: no task has the id")), example);
  }
});

test("an unknown tool is a tool error that names those there are", async (t) => {
  const { fail } = await connect(t);
  for (const name of ["no_such_tool", "constructor", "__proto__"]) {
    assert.match(await fail(name), new RegExp(`${name}.*get_profile, list_tasks, create_task`));
  }
});

test("with ENFORCE_SCOPES a tool asks for its own permission", async () => {
  const { result: { tools } } = await ask("tools/list", {}, enforcing);
  const expected = [
    ["offline_access"],
    ["tasks:read", "offline_access"],
    ["tasks:write", "offline_access"],
    ["tasks:write", "offline_access"],
    ["tasks:write", "offline_access"],
  ];
  for (const [index, { securitySchemes, _meta }] of tools.entries()) {
    assert.deepEqual(securitySchemes, [{ type: "oauth2", scopes: expected[index] }]);
    assert.deepEqual(_meta.securitySchemes, securitySchemes);
  }
});

test("with ENFORCE_SCOPES a missing permission is a tool error with a challenge that asks for all", async (t) => {
  const { get, call, list } = await connect(t, { scope: "tasks:read offline_access" }, enforcing);
  assert.deepEqual(await list(), { tasks: [] });
  assert.ok(await get("get_profile"));
  const { isError, content: [text], _meta } = await call("create_task", { title: "Not allowed" });
  assert.equal(isError, true);
  assert.match(text?.type === "text" ? text.text : "", /tasks:write/);
  const metadata = new URL("/.well-known/oauth-protected-resource/mcp", enforcing.url);
  const [challenge, ...more] = _meta?.["mcp/www_authenticate"] as string[];
  assert.deepEqual(more, []);
  const form = new RegExp(
    `^Bearer error="insufficient_scope", error_description="[^"]*tasks:write[^"]*", ` +
      `resource_metadata="${metadata}", scope="tasks:read tasks:write offline_access"$`,
  );
  assert.match(challenge ?? "", form);
});

test("with ENFORCE_SCOPES a permission counts in either claim", async (t) => {
  const inScope = await connect(t, { scope: "tasks:write" }, enforcing);
  await inScope.create({ title: "Allowed" });
  const inPermissions = await connect(t, { scope: "openid", permissions: ["tasks:write"] }, enforcing);
  await inPermissions.create({ title: "Allowed" });
  assert.match(await inPermissions.fail("list_tasks"), /tasks:read/);
});

test("without ENFORCE_SCOPES a token that grants nothing is enough", async (t) => {
  const { create, list } = await connect(t, { scope: undefined, permissions: [] });
  await create({ title: "Mine" });
  assert.equal((await list()).tasks.length, 1);
});

test("a store that fails is a tool error without its inner workings", async (t) => {
  const failing = () => Promise.reject(new Error("SQLITE_IOERR at /secret/path"));
  const store = {
    list: failing,
    create: failing,
    update: failing,
    delete: failing,
    check: failing,
    close: async () => {},
  };
  const broken = await startServer({ AUTH0_DOMAIN: tenant.origin }, store);
  t.after(broken.close);
  const { fail, get } = await connect(t, {}, broken);
  const text = await fail("list_tasks");
  assert.match(text, /Try again/);
  assert.doesNotMatch(text, /SQLITE|secret/);
  assert.ok(await get("get_profile"), "a tool without the store still works");
});
