/**
 * An MCP server that signs ChatGPT users in through Auth0. One request's path:
 *
 *   HTTP request -> `handle` (this file): Origin, route
 *                -> `authenticate` (auth.ts): who is it?
 *                -> `serveMcp` (this file): the message through a fresh MCP server
 *                -> a tool (tools.ts): what may they do, with whose tasks?
 *                -> HTTP reply
 *
 * Left out: TLS, IP filters (a proxy's work); rate limits (README); sessions, event streams (one JSON reply each).
 */
import { once } from "node:events";
import { readFileSync, realpathSync, statSync } from "node:fs";
import * as http from "node:http";
import { parseEnv } from "node:util";
// The lines with @ts-types show `deno check` where the SDK's types are.
// @ts-types="@modelcontextprotocol/sdk/shared/transport"
import type { Transport } from "@modelcontextprotocol/sdk/shared/transport.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import * as mcp from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";
import { createAuthenticator, describeError, HttpError, metadataUrl, protectedResourceMetadata } from "./auth.ts";
import type { Caller } from "./auth.ts";
import { createMcpServerFactory, databaseUrlSchema, openTaskStore, requestedScopes, RESOURCE_NAME } from "./tools.ts";
import type { TaskStore } from "./tools.ts";

// -------------------------------------------------------------------------------------------------- settings

/** The environment variables: a check for each and, where it can fail, a description of what the value must be. */
export const settingsSchema = z.object({
  AUTH0_DOMAIN: z.string().refine(isTenant).describe("the tenant's domain and nothing else, such as acme.us.auth0.com"),
  MCP_SERVER_URL: z.string().refine(isEndpoint).describe(
    "the public URL of the MCP endpoint, such as https://tasks.example.com/mcp: https, a path, no slash at the end, no " +
      "query, the host in lower case and without a default port",
  ),
  PORT: z.string().regex(/^[1-9]\d{0,4}$/).transform(Number).refine((port) => port <= 65_535).default(3000)
    .describe("a port number, 1 to 65535"),
  HOST: z.string().default("127.0.0.1"),
  DATABASE_URL: databaseUrlSchema,
  ENFORCE_SCOPES: z.enum(["true", "false"]).default("false").transform((text) => text === "true")
    .describe("true or false"),
  ALLOWED_ORIGINS: z.string().default("").transform((text) => text.split(",").map((one) => one.trim()).filter(Boolean))
    .refine((origins) => origins.every(isOrigin))
    .describe("origins such as https://example.com, comma separated: no path, no slash, lower case"),
  OPENAI_APPS_CHALLENGE: z.string().optional(),
  LOG_LEVEL: z.enum(["silent", "info", "debug"]).default("info").describe("silent, info or debug"),
});

/** `issuer` is the tenant as tokens name it: `https://<domain>/`. */
export type Settings = z.output<typeof settingsSchema> & { issuer: string };

/** A domain; or the origin of a stand-in tenant on this machine, such as http://localhost:4000. */
function isTenant(text: string): boolean {
  return /^([a-z\d-]+\.)+[a-z][a-z\d-]+$/.test(text) || (isLoopback(text) && isOrigin(text));
}

/** An endpoint URL that parsing does not change: clients send the parsed form, and Auth0 compares every character. */
function isEndpoint(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, origin, pathname } = new URL(text);
  return (protocol === "https:" || isLoopback(text)) && text === origin + pathname && !text.endsWith("/");
}

/** Whether an http or https URL leads to this machine (RFC 6761 for the names under localhost). */
function isLoopback(url: string): boolean {
  if (!URL.canParse(url)) return false;
  return /^https?:\/\/(([a-z\d-]+\.)*localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/.test(new URL(url).origin);
}

/** An origin of any scheme, in the form in which browsers send it. */
function isOrigin(text: string): boolean {
  return /^[a-z][a-z\d+.-]*:\/\/[^\s/?#@A-Z]+$/.test(text);
}

/**
 * Checks the settings. An empty variable, or one that still holds the README's placeholder, counts as not set.
 *
 * @throws {Error} A line for each value that is missing or malformed: its name, what was found, what it must be.
 */
export function readSettings(env: NodeJS.ProcessEnv): Settings {
  const isSet = (text = "") => text !== "" && !/^(your-tenant\.|https?:\/\/your-domain\.com\b)/.test(text);
  const given = Object.fromEntries(Object.entries(env).filter(([, text]) => isSet(text)));
  const { success, data, error } = settingsSchema.safeParse(given);
  if (success) {
    const { AUTH0_DOMAIN: domain } = data;
    return { ...data, issuer: domain.includes("://") ? `${domain}/` : `https://${domain}/` };
  }
  const lines = error.issues.map(({ path }) => {
    const name = path[0] as keyof typeof settingsSchema.shape;
    const found = given[name]?.replace(/.*@/s, "…@"); // what stands before an @ may be a password
    const shown = name === "DATABASE_URL" ? "malformed" : JSON.stringify(found); // its password may stand anywhere
    return `${name} is ${found ? shown : "missing"}: it must be ${settingsSchema.shape[name].description}`;
  });
  throw new Error(lines.join("\n"));
}

/** The variables in the file `.env` of the working directory, if there is one, and the real environment, which wins. */
export function readEnvironment(): NodeJS.ProcessEnv {
  const isFile = statSync(".env", { throwIfNoEntry: false })?.isFile(); // Docker mounts a missing file as a folder
  const file = isFile ? readFileSync(".env", "utf8").replace(/^\uFEFF/, "") : ""; // a byte order mark
  const set = Object.entries(process.env).filter(([, text]) => text); // an empty variable counts as not set
  return { ...parseEnv(file), ...Object.fromEntries(set) };
}

// ------------------------------------------------------------------------------------------------------ HTTP

const MAX_BODY_BYTES = 1024 * 1024;

const LIMITS: http.ServerOptions = {
  headersTimeout: 10_000, // all in milliseconds
  requestTimeout: 30_000,
  connectionsCheckingInterval: 1_000, // how often Node checks the two above
  keepAliveTimeout: 620_000, // longer than the 600 s of Google's load balancer, which would send on a closed connection
};

interface Reply {
  status: number;
  headers?: Record<string, string>;
  /** A string is sent as plain text, anything else as JSON. */
  body?: unknown;
}

/** What the log says about a request. Filled in step by step, so that a refusal is logged with what was known. */
interface LogEntry {
  caller?: Caller;
  message?: mcp.JSONRPCMessage;
  refusal?: string;
}

/** Makes the server. The caller lets it listen (tests: on a port of their own), and closes the store. */
export function createServer(settings: Settings, store: TaskStore): http.Server {
  const server = http.createServer(LIMITS);
  server.timeout = 120_000; // ms without traffic during a request: the client stopped reading, or a tool takes too long
  const { issuer, MCP_SERVER_URL: url, ENFORCE_SCOPES: enforceScopes, OPENAI_APPS_CHALLENGE: appsChallenge } = settings;
  const log = createLog(settings.LOG_LEVEL);
  const resource = { issuer, url, name: RESOURCE_NAME, scopes: requestedScopes(enforceScopes) };
  const authenticate = createAuthenticator(resource);
  const createMcpServer = createMcpServerFactory({ resource, enforceScopes, store, warn: log });
  const origins = new Set([new URL(url).origin, "https://chatgpt.com", ...settings.ALLOWED_ORIGINS]);

  async function checkHealth(): Promise<string> {
    if (!server.listening) throw new HttpError(503, "The server is stopping");
    await store.check().catch((cause: unknown) => {
      throw new HttpError(503, "The database does not answer", { cause });
    });
    return "ok\n";
  }

  const endpoint = pathOf(url);
  const metadata = () => protectedResourceMetadata(resource);
  /** What GET is answered with, by path: each function returns the body. */
  const documents = new Map<string, () => unknown>([
    [pathOf(metadataUrl(url)), metadata],
    ["/.well-known/oauth-protected-resource", metadata],
    ["/health", checkHealth],
  ]);
  if (appsChallenge) documents.set("/.well-known/openai-apps-challenge", () => appsChallenge);

  /** Sets the CORS headers on the response at once, and not on the reply, since a refusal needs them too. */
  async function handle(request: http.IncomingMessage, response: http.ServerResponse, entry: LogEntry): Promise<Reply> {
    const { method, headers: { origin } } = request;
    const path = pathOf(request.url);
    const document = path === endpoint ? undefined : documents.get(path);
    if (document === metadata) {
      response.setHeader("Access-Control-Allow-Origin", "*"); // any page may read where to sign in
    } else if (origin !== undefined) {
      // Against DNS rebinding: a page whose name now resolves to this machine (MCP, Streamable HTTP, Security Warning).
      const isAllowed = origins.has(origin) || isLoopback(origin);
      if (!isAllowed) throw new HttpError(403, `Origin ${origin} is not allowed: add it to ALLOWED_ORIGINS`);
      response.setHeader("Access-Control-Allow-Origin", origin);
      response.setHeader("Vary", "Origin");
    }
    response.setHeader("Access-Control-Expose-Headers", "WWW-Authenticate");
    if (path !== endpoint && document === undefined) {
      throw new HttpError(404, `Nothing is served here. The URL to paste into ChatGPT is ${url}`);
    }
    if (method === "OPTIONS") return preflight(request);
    if (document === undefined) return await serveMcp(request, response, entry);
    if (method === "GET" || method === "HEAD") return { status: 200, body: await document() };
    throw new HttpError(405, "Only GET is served here", { headers: { Allow: "GET, HEAD" } });
  }

  async function serveMcp(request: http.IncomingMessage, response: http.ServerResponse, entry: LogEntry) {
    entry.caller = await authenticate(request.headers.authorization);
    if (request.method !== "POST") throw new HttpError(405, "Only POST is served here", { headers: { Allow: "POST" } });
    const message = entry.message = parseMessage(await readBody(request));
    checkProtocolVersion(request, message);

    const mcpServer = createMcpServer(entry.caller);
    const transport = new PostTransport();
    await mcpServer.connect(transport);
    response.on("close", () => {
      // Closed before the reply was sent: the client has gone. Closing the MCP server aborts the tool.
      if (!response.writableFinished) void mcpServer.close();
    });
    const body = await transport.deliver(message);
    return { status: body === undefined ? 202 : 200, body };
  }

  server.on("request", async (request, response) => {
    const started = performance.now();
    const entry: LogEntry = {};
    const reply = await handle(request, response, entry).catch((error: unknown) => {
      entry.refusal = describeError(error);
      return errorReply(error);
    });
    const isGone = response.destroyed || request.errored !== null;
    if (!isGone) send(response, reply);
    request.resume(); // reads the rest of a refused body: a client still sending would get EPIPE instead of the reply
    const isRefused = entry.refusal !== undefined && !isGone; // a client that left was not refused: its body broke off
    if (!isRefused && settings.LOG_LEVEL !== "debug") return;
    const status = isGone ? "the client has gone after" : reply.status;
    log(describeRequest(request, `${status} ${Math.round(performance.now() - started)} ms`, entry));
  });
  return server;
}

/** The refusal as a JSON-RPC error, which MCP clients read. `id` is null: the refusal is of the HTTP request. */
function errorReply(error: unknown): Reply {
  const refusal = error instanceof HttpError ? error : new HttpError(500, "The server failed; its log says why");
  const { status, headers, message, code } = refusal;
  return { status, headers, body: { jsonrpc: "2.0", error: { code, message }, id: null } };
}

function send(response: http.ServerResponse, { status, body, headers = {} }: Reply) {
  const isText = typeof body === "string";
  response.statusCode = status;
  response.setHeader("Cache-Control", "no-store"); // a cached reply would hide a changed setting
  if (body !== undefined) response.setHeader("Content-Type", isText ? "text/plain; charset=utf-8" : "application/json");
  for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
  response.end(isText ? body : JSON.stringify(body));
}

/**
 * The path to route by and to log. Removes the query, since it may hold a token, and doubled or trailing slashes.
 * Nothing else is normalized, so that a proxy's rules by path cannot be passed.
 */
function pathOf(target = "/"): string {
  const path = target.replace(/^https?:\/\/[^/?#]*/i, "").replace(/[?#].*/, ""); // absolute form (RFC 9112 §3.2.2)
  return `/${path.split("/").filter(Boolean).join("/")}`;
}

/** Pages of an allowed origin may send any header: access depends on the token alone. */
function preflight({ headers }: http.IncomingMessage): Reply {
  const allowed = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": headers["access-control-request-headers"] ?? "",
    "Access-Control-Max-Age": "86400", // seconds
  };
  return { status: 204, headers: allowed };
}

/** Read by events: leaving a `for await` early would close the connection before the 413 is sent. */
function readBody(request: http.IncomingMessage): Promise<Buffer> {
  const { "content-type": type = "", "content-encoding": encoding = "" } = request.headers;
  if (!/^application\/json\s*(;|$)/i.test(type)) throw new HttpError(415, "Content-Type must be application/json");
  if (!/^(identity)?$/i.test(encoding)) throw new HttpError(415, `Content-Encoding ${encoding} is not read here`);
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    let size = 0;
    request.on("data", (chunk: Buffer) => {
      size += chunk.length;
      if (size <= MAX_BODY_BYTES) chunks.push(chunk);
      else reject(new HttpError(413, `The body must not exceed ${MAX_BODY_BYTES} bytes`));
    });
    request.on("end", () => resolve(Buffer.concat(chunks)));
    request.on("error", reject);
    if (request.errored) reject(request.errored); // the client had left before these listeners were added
  });
}

// ------------------------------------------------------------------------------------------------------- MCP

const UTF8 = new TextDecoder("utf-8", { fatal: true }); // drops a byte order mark

function parseJson(bytes: Buffer) {
  try {
    return JSON.parse(UTF8.decode(bytes));
  } catch {
    throw new HttpError(400, "Parse error: the body is not JSON in UTF-8", { code: mcp.ErrorCode.ParseError });
  }
}

/** Removes null where clients have been seen to send it, and `task`: no tasks are declared here (MCP, Tasks). */
function parseMessage(bytes: Buffer): mcp.JSONRPCMessage {
  const body = parseJson(bytes);
  if (body?.params === null) delete body.params;
  const params = body?.params ?? {};
  for (const object of [params, params._meta, params.clientInfo]) {
    if (typeof object !== "object" || Array.isArray(object)) continue; // a string would be walked letter by letter
    for (const name in object) if (object[name] === null) delete object[name];
  }
  delete params.task;
  // Nothing here reads these two, and for a megabyte of wrong ones the SDK would build an error message of 128 MB.
  delete params.clientInfo?.icons;
  if (typeof params.capabilities === "object") params.capabilities = {};
  const { success, data } = mcp.JSONRPCMessageSchema.safeParse(body);
  if (success) return data;
  const text = "Invalid Request: the body must be one JSON-RPC 2.0 message, and no batch";
  throw new HttpError(400, text, { code: mcp.ErrorCode.InvalidRequest });
}

/** The error text is exactly that of the SDK's transport: newer clients recognize it and use an older revision. */
function checkProtocolVersion({ headers }: http.IncomingMessage, message: mcp.JSONRPCMessage) {
  const header = headers["mcp-protocol-version"];
  if (header === undefined || ("method" in message && message.method === "initialize")) return;
  const given = [...new Set(String(header).split(",").map((value) => value.trim()))].join(", "); // Node joins repeats
  if (mcp.SUPPORTED_PROTOCOL_VERSIONS.includes(given)) return;
  const supported = mcp.SUPPORTED_PROTOCOL_VERSIONS.join(", ");
  throw new HttpError(400, `Bad Request: Unsupported protocol version: ${given} (supported versions: ${supported})`);
}

/**
 * The SDK's `Transport` over one POST: one message in, and one reply out if it was a request.
 *
 * A stateless server that answers in JSON needs no more. The SDK's own HTTP transport adds sessions, event streams and
 * resumption, and converts to the web's Request and Response, which doubles the CPU of a call. Notifications that a
 * tool sends are dropped: there is no stream to send them on.
 */
class PostTransport implements Transport {
  onmessage: Transport["onmessage"];
  onclose: Transport["onclose"];
  #settle = (_reply?: mcp.JSONRPCMessage) => {};

  async start() {}

  async send(message: mcp.JSONRPCMessage) {
    if (!("method" in message)) this.#settle(message);
  }

  async close() {
    this.#settle();
    this.onclose?.();
  }

  /** Resolves with the reply to a request; with undefined for other messages, or when closed before the reply. */
  deliver(message: mcp.JSONRPCMessage): Promise<mcp.JSONRPCMessage | undefined> {
    return new Promise((resolve) => {
      this.#settle = resolve;
      if ("method" in message) this.onmessage?.(message); // not a reply, since this server asks its clients nothing
      if (!("method" in message && "id" in message)) resolve(undefined);
    });
  }
}

// ------------------------------------------------------------------------------------------------------- log

/** Writes one line per event to stderr. Parts come from clients: line breaks and terminal codes are replaced. */
function createLog(level: Settings["LOG_LEVEL"]): (line: string) => void {
  if (level === "silent") return () => {};
  return (line) => {
    process.stderr.write(`${new Date().toISOString()} ${line.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "?")}\n`);
  };
}

function describeRequest({ method, url }: http.IncomingMessage, outcome: string, entry: LogEntry): string {
  const { message, caller, refusal } = entry;
  const call = message && describeCall(message);
  const claims = JSON.stringify(caller?.claims);
  return [method, pathOf(url), call, outcome, caller?.subject, refusal, claims].filter(Boolean).join(" ");
}

/** The JSON-RPC method and the tool's name. */
function describeCall(message: mcp.JSONRPCMessage): string {
  if (!("method" in message)) return "reply";
  const name = message.params?.name; // from the client, so of any type
  const call = typeof name === "string" ? [message.method, name] : [message.method];
  return call.map((part) => part.replace(/\s/g, "?")).join(" ").slice(0, 200); // a blank would begin another field
}

// ----------------------------------------------------------------------------------------------- start, stop

/** Refuses new connections and lets requests in flight finish; closes the rest after 7 s (Docker kills after 10 s). */
export async function stop(server: http.Server): Promise<void> {
  const closed = once(server.close(), "close");
  const closeIdle = setInterval(() => server.closeIdleConnections(), 250); // those whose request has been answered
  const closeAll = setTimeout(() => server.closeAllConnections(), 7_000);
  await closed;
  clearInterval(closeIdle);
  clearTimeout(closeAll);
}

async function main() {
  process.stderr.on("error", () => {}); // EPIPE when the log's reader has gone: it cannot be logged
  const settings = readSettings(readEnvironment());
  const log = createLog(settings.LOG_LEVEL);
  const store = await openTaskStore(settings.DATABASE_URL, log);
  const server = createServer(settings, store);
  // A promise that nobody awaited is a mistake in one call: the server goes on for the others.
  process.on("unhandledRejection", (error) => log(`A promise failed that nobody awaited: ${describeError(error)}`));
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.once(signal, async () => {
      log(`Stopping on ${signal}`);
      setTimeout(() => process.exit(), 9_000); // if closing hangs: before Docker's SIGKILL at 10 s
      await stop(server);
      await store.close();
      process.exit();
    });
  }
  const { HOST, PORT, MCP_SERVER_URL, issuer } = settings;
  await once(server.listen(PORT, HOST), "listening");
  log(`Listening on ${HOST}:${PORT} for ${MCP_SERVER_URL}, with users from ${issuer}`);
}

if (process.argv[1] !== undefined && realpathSync(process.argv[1]) === import.meta.filename) { // not when imported
  await main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
    process.exit(1);
  });
}
