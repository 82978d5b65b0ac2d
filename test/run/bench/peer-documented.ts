/**
 * The SDK's documented stateless pattern on node:http, for bench.ts: server, tools, schemas, validator and
 * transport are made for every request, and the token is verified each time with jose's remote key set. The tools
 * and the store are those of server.ts.
 *
 * The SDK's example also runs on Express and replies with event streams: both are left out, since they cost more.
 * Left out too is what server.ts has around it: Origin check, size limit, time-outs, log, explained refusals.
 */
import { createServer } from "node:http";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { createRemoteJWKSet, jwtVerify } from "jose";
import { z } from "zod";
import { newTask, openTaskStore } from "../../../tools.ts";

const { AUTH0_DOMAIN = "", MCP_SERVER_URL = "", DATABASE_URL = "", PORT } = process.env;
const keys = createRemoteJWKSet(new URL(`${AUTH0_DOMAIN}/.well-known/jwks.json`));
const store = await openTaskStore(DATABASE_URL, console.error);

function getServer(owner: string): McpServer {
  const status = z.enum(["todo", "in_progress", "done"]);
  const times = { due_at: z.string().nullable(), created_at: z.string(), updated_at: z.string() };
  const task = z.object({ id: z.string(), title: z.string(), notes: z.string().nullable(), status, ...times });
  const title = z.string().trim().min(1).max(200).describe("What to do, in the user's words");
  const notes = z.string().max(2_000).nullish().describe("Details; null for none");
  const due_at = z.iso.datetime({ offset: true }).nullish().describe("When it is due, ISO 8601; null for no date");
  const id = z.uuid().describe("The id of a task, from list_tasks or create_task");

  const server = new McpServer({ name: "tasks", version: "1.0.0" });
  server.registerTool("get_profile", {
    title: "Get my profile",
    description: "Use this to learn which account is signed in. Not for tasks.",
    outputSchema: { id: z.string() },
    annotations: { readOnlyHint: true },
  }, () => result({ id: owner }));
  server.registerTool("list_tasks", {
    title: "List tasks",
    description: "Use this when the user asks what there is to do, and to find the id of a task before changing it.",
    inputSchema: {
      status: status.optional().describe("Only tasks with this status"),
      limit: z.int().min(1).max(100).default(20).describe("How many at most"),
    },
    outputSchema: { tasks: z.array(task) },
    annotations: { readOnlyHint: true },
  }, async ({ status, limit }) => result({ tasks: await store.list(owner, { status, limit }) }));
  server.registerTool("create_task", {
    title: "Create a task",
    description: "Use this when the user wants to remember or plan something new.",
    inputSchema: { title, notes, due_at, idempotency_key: z.string().max(200).optional() },
    outputSchema: { task },
    annotations: { readOnlyHint: false },
  }, async ({ title, notes = null, due_at = null, idempotency_key }) => {
    return result({ task: await store.create(owner, newTask({ title, notes, due_at }), idempotency_key) });
  });
  server.registerTool("update_task", {
    title: "Change a task",
    description: "Use this to rename, reschedule, annotate, start, finish or reopen a task that exists.",
    inputSchema: { id, title: title.optional(), notes, due_at, status: status.optional() },
    outputSchema: { task },
    annotations: { readOnlyHint: false },
  }, async ({ id, ...changes }) => {
    const given = Object.fromEntries(Object.entries(changes).filter(([, value]) => value !== undefined));
    return result({ task: await store.update(owner, id, { ...given, updated_at: new Date().toISOString() }) });
  });
  server.registerTool("delete_task", {
    title: "Delete a task",
    description: "Use this only when the user wants a task gone for good.",
    inputSchema: { id },
    outputSchema: { deleted: z.boolean() },
    annotations: { readOnlyHint: false },
  }, async ({ id }) => result({ deleted: await store.delete(owner, id) }));
  return server;
}

function result(structuredContent: Record<string, unknown>) {
  return { content: [{ type: "text" as const, text: JSON.stringify(structuredContent) }], structuredContent };
}

createServer(async (request, response) => {
  const token = request.headers.authorization?.replace("Bearer ", "") ?? "";
  const options = { issuer: `${AUTH0_DOMAIN}/`, audience: MCP_SERVER_URL };
  const verified = await jwtVerify(token, keys, options).catch(() => undefined);
  if (verified === undefined) {
    response.writeHead(401, { "WWW-Authenticate": 'Bearer error="invalid_token"', "Content-Length": 0 }).end();
    return;
  }
  const server = getServer(verified.payload.sub ?? "");
  const transport = new StreamableHTTPServerTransport({ enableJsonResponse: true });
  response.on("close", () => {
    void transport.close();
    void server.close();
  });
  await server.connect(transport);
  await transport.handleRequest(request, response);
}).listen(Number(PORT), "127.0.0.1", () => console.error("Listening on", PORT));
