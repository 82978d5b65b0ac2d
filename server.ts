/**
 * An MCP server that signs ChatGPT users in through Auth0. One request's path:
 *
 *   HTTP request -> `handle` (this file): Origin, route, method, size, JSON
 *                -> `authenticate` (auth.ts): who is it?
 *                -> `exchange` (this file): the messages through a fresh MCP server
 *                -> a tool (tools.ts): what may they do, with whose tasks?
 *                -> HTTP reply
 *
 * Runs as it is on `tsx server.ts`, `node server.ts` (22.18 and later) and `deno run -A server.ts`.
 */
import { once } from "node:events";
import { realpathSync } from "node:fs";
import * as http from "node:http";
import * as net from "node:net";
import { fileURLToPath } from "node:url";
// @ts-types="@modelcontextprotocol/sdk/inMemory"
import { InMemoryTransport } from "@modelcontextprotocol/sdk/inMemory.js";
// @ts-types="@modelcontextprotocol/sdk/server/mcp"
import type { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
// @ts-types="@modelcontextprotocol/sdk/shared/mediaType"
import { isJsonContentType } from "@modelcontextprotocol/sdk/shared/mediaType.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import * as mcp from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";
import {
  AuthError,
  challenge,
  createAuthenticator,
  metadataUrl,
  protectedResourceMetadata,
  reason,
} from "./auth.ts";
import type { Caller } from "./auth.ts";
import { createMcpServerFactory, openTaskStore, requestedScopes } from "./tools.ts";
import type { TaskStore } from "./tools.ts";

// --------------------------------------------------------------------------------------------- settings

export interface Settings {
  /** `https://<AUTH0_DOMAIN>/` */
  issuer: string;
  /** MCP_SERVER_URL, character for character: audience, resource and API Identifier in one. */
  serverUrl: string;
  port: number;
  host: string;
  databaseUrl: string | undefined;
  enforceScopes: boolean;
  allowedOrigins: string[];
  logLevel: "silent" | "info" | "debug";
}

const isLoopback = (hostname: string) => /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);

const parseUrl = (text: string) => URL.canParse(text) ? new URL(text) : undefined;

function isDomain(text: string): boolean {
  const url = parseUrl(text);
  if (url !== undefined && isLoopback(url.hostname)) return url.origin === text; // the stand-in tenant
  return /^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$/.test(text);
}

function isServerUrl(text: string): boolean {
  const url = parseUrl(text);
  if (url === undefined || url.href !== text) return false; // clients would write it otherwise than the tenant
  const isSafe = url.protocol === "https:" || (url.protocol === "http:" && isLoopback(url.hostname));
  return isSafe && text === url.origin + url.pathname && !text.endsWith("/");
}

const isPort = (text: string) => /^\d{1,5}$/.test(text) && Number(text) <= 65_535;

const isDatabaseUrl = (text: string) => /^(file:.+|memory:|postgres(ql)?:\/\/.+)$/.test(text);

const splitOrigins = (text: string) =>
  text.split(",").map((origin) => origin.trim()).filter((origin) => origin !== "");

const areOrigins = (text: string) =>
  splitOrigins(text).every((origin) => parseUrl(origin)?.origin === origin);

const value = (isValid: (text: string) => boolean, expected: string) =>
  z.string(expected).refine(isValid, expected);

const environment = z.object({
  AUTH0_DOMAIN: value(
    isDomain,
    "the tenant's domain and nothing else, such as your-tenant.us.auth0.com: no https://, no slash, lower case",
  ),
  MCP_SERVER_URL: value(
    isServerUrl,
    "the public URL of the MCP endpoint, such as https://your-domain.com/mcp: https, a path, no slash at the end, " +
      "no query, no fragment, the host in lower case and without a default port",
  ),
  PORT: value(isPort, "a port number, 0 to 65535").default("3000"),
  HOST: z.string().default("127.0.0.1"),
  DATABASE_URL: value(isDatabaseUrl, "file:tasks.db, memory: or postgres://user:password@host/database")
    .optional(),
  ENFORCE_SCOPES: z.enum(["true", "false"], "true or false").default("false"),
  ALLOWED_ORIGINS: value(
    areOrigins,
    "origins such as https://example.com, comma separated: no path, no slash",
  ).default(""),
  LOG_LEVEL: z.enum(["silent", "info", "debug"], "silent, info or debug").default("info"),
});

/**
 * Reads the settings. A variable that is set to nothing counts as not set.
 *
 * @throws {Error} A line for each value that is missing or malformed: what it is, and what it must look like.
 */
export function readSettings(env: Record<string, string | undefined>): Settings {
  const given = Object.fromEntries(Object.entries(env).filter(([, text]) => text !== ""));
  const { data, error } = environment.safeParse(given);
  if (data === undefined) {
    const lines = error.issues.map(({ path, message }) => {
      const name = path.join();
      // A database URL may hold a password: it is not repeated.
      const found = given[name] === undefined
        ? "missing"
        : name === "DATABASE_URL"
        ? "malformed"
        : `'${given[name]}'`;
      return `${name} is ${found}: it must be ${message}`;
    });
    throw new Error(lines.join("\n"));
  }
  const { AUTH0_DOMAIN: domain } = data;
  return {
    issuer: domain.includes("://") ? `${domain}/` : `https://${domain}/`,
    serverUrl: data.MCP_SERVER_URL,
    port: Number(data.PORT),
    host: data.HOST,
    databaseUrl: data.DATABASE_URL,
    enforceScopes: data.ENFORCE_SCOPES === "true",
    allowedOrigins: splitOrigins(data.ALLOWED_ORIGINS),
    logLevel: data.LOG_LEVEL,
  };
}

// ------------------------------------------------------------------------------------------------- HTTP

const MAX_BODY_BYTES = 1024 * 1024;
const MAX_BATCH = 100; // as the SDK's own transport

interface Refusal {
  status: number;
  message: string;
  headers: Record<string, string>;
  /** Of the JSON-RPC error in the body. */
  code: number;
}

/** A request refused for what it is as HTTP. The message is for whoever wrote the client. */
class HttpError extends Error implements Refusal {
  readonly status: number;
  readonly headers: Record<string, string>;
  readonly code: number;

  constructor(status: number, message: string, headers: Record<string, string> = {}, code = -32000) {
    super(message);
    this.status = status;
    this.headers = headers;
    this.code = code;
  }
}

const FAILURE: Refusal = {
  status: 500,
  message: "The server failed; its log says why",
  headers: {},
  code: mcp.ErrorCode.InternalError,
};

/** What the log says of a request; filled in on the way. */
interface Visit {
  call: string;
  caller?: Caller;
  refusal?: string;
}

type Route = (
  request: http.IncomingMessage,
  response: http.ServerResponse,
  visit: Visit,
) => void | Promise<void>;

/**
 * Makes the server, not yet listening, so that tests can start the real one on a port of their own.
 *
 * @param store Stays the caller's to close.
 */
export function createServer(settings: Settings, store: TaskStore): http.Server {
  const { issuer, serverUrl, enforceScopes } = settings;
  const log = createLog(settings.logLevel);
  const tenant = { issuer, audience: serverUrl, warn: log.info };
  const authenticate = createAuthenticator(tenant);
  const createMcpServer = createMcpServerFactory({ resource: serverUrl, enforceScopes, warn: log.info });
  const isHealthy = createHealthCheck(store);

  const { origin: serverOrigin, pathname: mcpPath } = new URL(serverUrl);
  const origins = new Set([serverOrigin, "https://chatgpt.com", ...settings.allowedOrigins]);
  const metadata = protectedResourceMetadata(tenant, "Tasks", requestedScopes(settings));
  const welcome = `An MCP server for ChatGPT, with users signed in through Auth0.

Paste this URL into ChatGPT (README, Step 7):

  ${serverUrl}

Who signs users in: ${issuer}
What a client reads first: ${metadataUrl(serverUrl)}
`;

  const showMetadata = readOnly((response) => reply(response, 200, metadata));
  const routes = new Map<string, Route>([
    ["/", readOnly((response) => reply(response, 200, welcome))],
    [
      "/healthz",
      readOnly(async (response) => {
        const isUp = server.listening && await isHealthy();
        reply(response, isUp ? 200 : 503, isUp ? "ok\n" : "not ok\n");
      }),
    ],
    ["/.well-known/oauth-protected-resource", showMetadata],
    [new URL(metadataUrl(serverUrl)).pathname, showMetadata],
    [mcpPath, serveMcp],
  ]);

  async function handle(request: http.IncomingMessage, response: http.ServerResponse, visit: Visit) {
    const { origin } = request.headers;
    // A page in the user's browser must not reach a server it was not meant for (MCP, Streamable HTTP, Security).
    if (origin !== undefined) {
      if (!origins.has(origin) && !isLoopback(parseUrl(origin)?.hostname ?? "")) {
        throw new HttpError(403, `Origin ${origin} is not allowed: add it to ALLOWED_ORIGINS`);
      }
      response.setHeader("Access-Control-Allow-Origin", origin);
      response.setHeader(
        "Access-Control-Expose-Headers",
        "WWW-Authenticate, Mcp-Session-Id, MCP-Protocol-Version",
      );
      response.setHeader("Vary", "Origin");
    }
    const route = routes.get(pathOf(request));
    if (route === undefined) {
      throw new HttpError(404, `Nothing is served here. The MCP endpoint is ${serverUrl}`);
    }
    if (request.method === "OPTIONS") return answerPreflight(response);
    await route(request, response, visit);
  }

  async function serveMcp(request: http.IncomingMessage, response: http.ServerResponse, visit: Visit) {
    const caller = visit.caller = await authenticate(request.headers.authorization);
    // Stateless: there is no stream to open with GET and no session to end with DELETE.
    if (request.method !== "POST") throw new HttpError(405, "Only POST is served here", { Allow: "POST" });
    const messages = readMessages(request.headers, await readJson(request));
    const requests = messages.filter((message) => "method" in message && "id" in message);
    const tools = requests.flatMap(({ method, params }) =>
      method === "tools/call" && typeof params?.name === "string" ? [params.name] : []
    );
    const methods = messages.map((message) => "method" in message ? message.method : "reply");
    visit.call = [...methods, ...tools].join(" ").slice(0, 200);

    const server = createMcpServer(caller, store, tools);
    // Once it has replied it holds nothing open; to close it then would only build errors that nobody reads.
    response.on("close", () => response.writableFinished || void server.close());
    const replies = await exchange(server, messages, requests.length);
    if (replies.length === 0) response.writeHead(202).end();
    else reply(response, 200, replies.length === 1 ? replies[0] : replies);
  }

  function refuse(error: unknown, response: http.ServerResponse, visit: Visit) {
    visit.refusal = reason(error);
    if (response.headersSent || response.destroyed || response.socket?.destroyed) { // the last is Deno's sign
      response.destroy();
    } else if (error instanceof AuthError) {
      const { status, code, message } = error;
      const header = challenge(serverUrl, code && { error: code, error_description: message });
      const headers = status === 401 ? { "WWW-Authenticate": header } : { "Retry-After": "5" };
      replyError(response, { status, message, headers, code: -32000 });
    } else {
      replyError(response, error instanceof HttpError ? error : FAILURE);
    }
  }

  const server = http.createServer(LIMITS, async (request, response) => {
    const started = performance.now();
    const visit: Visit = { call: "" };
    if (!server.listening) response.setHeader("Connection", "close"); // see `stop`
    try {
      await handle(request, response, visit);
    } catch (error) {
      refuse(error, response, visit);
    }
    const { call, caller, refusal } = visit;
    const write = refusal === undefined ? log.debug : log.info;
    write(() => {
      const status = response.headersSent ? response.statusCode : "cut off";
      const time = `${Math.round(performance.now() - started)} ms`;
      const who = caller === undefined
        ? ""
        : `${caller.subject} ${settings.logLevel === "debug" ? JSON.stringify(caller.claims) : ""}`;
      return [request.method, pathOf(request), call, status, time, who, refusal].filter(Boolean).join(" ");
    });
  });
  server.timeout = 120_000; // milliseconds without a byte either way: who never reads a reply holds no socket for ever
  return server;
}

const LIMITS: http.ServerOptions = {
  maxHeaderSize: 16 * 1024, // bytes; a token of Auth0's has 1 to 2 KiB
  headersTimeout: 10_000, // milliseconds, and so below
  requestTimeout: 30_000,
  keepAliveTimeout: 65_000, // longer than the usual proxy's: who closes first may cut off the other's request
  connectionsCheckingInterval: 5_000,
};

function pathOf(request: http.IncomingMessage): string {
  return request.url?.split("?", 1)[0] ?? "/"; // the query is never read: tokens in it would end up in logs
}

function readOnly(show: (response: http.ServerResponse) => void | Promise<void>): Route {
  return (request, response) => {
    if (request.method === "GET" || request.method === "HEAD") return show(response);
    throw new HttpError(405, "Only GET is served here", { Allow: "GET, HEAD" });
  };
}

/** Sends text as it is, and anything else as JSON. */
function reply(
  response: http.ServerResponse,
  status: number,
  body: unknown,
  headers: Record<string, string> = {},
) {
  const [type, text] = typeof body === "string"
    ? ["text/plain; charset=utf-8", body]
    : ["application/json", JSON.stringify(body)];
  response.writeHead(status, {
    "Content-Type": type,
    "Content-Length": Buffer.byteLength(text),
    "Cache-Control": "no-store", // a cached challenge or metadata document would outlive the setting it came from
    ...headers,
  });
  response.end(text);
}

function answerPreflight(response: http.ServerResponse) {
  response.writeHead(204, {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers":
      "Authorization, Content-Type, Accept, MCP-Protocol-Version, Mcp-Session-Id, Last-Event-ID",
    "Access-Control-Max-Age": "86400",
  });
  response.end();
}

/** A refusal as MCP's clients read it: a JSON-RPC error that answers no request in particular. */
function replyError(response: http.ServerResponse, { status, message, headers, code }: Refusal) {
  reply(response, status, { jsonrpc: "2.0", error: { code, message }, id: null }, headers);
}

async function readJson(request: http.IncomingMessage): Promise<unknown> {
  if (!isJsonContentType(request.headers["content-type"])) {
    throw new HttpError(415, "Content-Type must be application/json");
  }
  const body = await readBody(request);
  try {
    return JSON.parse(body);
  } catch {
    throw new HttpError(400, "Parse error: the body is not JSON", {}, mcp.ErrorCode.ParseError);
  }
}

/** Counts while the body comes in, whatever Content-Length says. */
function readBody(request: http.IncomingMessage): Promise<string> {
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    let size = 0;
    const refuse = () => reject(new HttpError(413, `The body must not exceed ${MAX_BODY_BYTES} bytes`));
    if (Number(request.headers["content-length"]) > MAX_BODY_BYTES) refuse();
    // What comes after a refusal is read and dropped: a client that is still sending would not see the answer.
    request.on("data", (chunk: Buffer) => {
      size += chunk.length;
      if (size > MAX_BODY_BYTES) refuse();
      else chunks.push(chunk);
    });
    request.on("end", () => resolve(Buffer.concat(chunks).toString()));
    request.on("error", reject);
    request.on("close", () => request.readableEnded || reject(new Error("The client has gone")));
  });
}

// -------------------------------------------------------------------------------------------------- MCP

/**
 * What a POST of MCP Streamable HTTP has to look like, revision 2025-11-25, with the answers of the SDK's own
 * HTTP transport (a test compares the two). That transport is not used itself: it goes through the web's Request
 * and Response, which would double the cost of a call.
 */
function readMessages(headers: http.IncomingHttpHeaders, body: unknown): mcp.JSONRPCMessage[] {
  const accept = headers.accept ?? "";
  if (!accept.includes("application/json") || !accept.includes("text/event-stream")) {
    throw new HttpError(
      406,
      "Not Acceptable: Client must accept both application/json and text/event-stream",
    );
  }
  const batch = Array.isArray(body) ? body : [body];
  if (batch.length > MAX_BATCH) {
    throw new HttpError(
      400,
      `Invalid Request: Batch must not exceed ${MAX_BATCH} messages`,
      {},
      mcp.ErrorCode.InvalidRequest,
    );
  }
  const messages = batch.map((message) => {
    const { data } = mcp.JSONRPCMessageSchema.safeParse(message);
    if (data === undefined) {
      throw new HttpError(400, "Parse error: Invalid JSON-RPC message", {}, mcp.ErrorCode.ParseError);
    }
    return data;
  });
  // The method first: for every other message the SDK's check would fail, and build a list of reasons.
  const isInitialize = messages.some((message) =>
    "method" in message && message.method === "initialize" && mcp.isInitializeRequest(message)
  );
  if (isInitialize && messages.length > 1) {
    throw new HttpError(
      400,
      "Invalid Request: Only one initialization request is allowed",
      {},
      mcp.ErrorCode.InvalidRequest,
    );
  }
  const revision = headers["mcp-protocol-version"];
  if (
    !isInitialize && revision !== undefined && !mcp.SUPPORTED_PROTOCOL_VERSIONS.includes(String(revision))
  ) {
    const supported = mcp.SUPPORTED_PROTOCOL_VERSIONS.join(", ");
    throw new HttpError(
      400,
      `Bad Request: Unsupported protocol version: ${revision} (supported versions: ${supported})`,
    );
  }
  return messages;
}

/**
 * Runs the messages of one request through its server.
 *
 * @param expected How many of them are requests, each of which gets one reply.
 * @throws {Error} When the server is closed before all replies are there, since the client has gone.
 */
async function exchange(
  server: McpServer,
  messages: mcp.JSONRPCMessage[],
  expected: number,
): Promise<mcp.JSONRPCMessage[]> {
  const [client, transport] = InMemoryTransport.createLinkedPair();
  await server.connect(transport);
  const replies: mcp.JSONRPCMessage[] = [];
  return new Promise((resolve, reject) => {
    client.onmessage = (message) => {
      const isReply = !("method" in message); // rather than a notification
      if (isReply && replies.push(message) === expected) resolve(replies);
    };
    client.onclose = () => reject(new Error("The client has gone"));
    for (const message of messages) {
      // Only a request of the same batch could be cancelled, and would then never get the reply awaited here.
      if ("method" in message && message.method === "notifications/cancelled") continue;
      void client.send(message);
    }
    if (expected === 0) resolve(replies);
  });
}

// ------------------------------------------------------------------------------------------ start, stop

type Line = string | (() => string);

/** One line an event, to stderr; `debug` lines are made only where they are wanted. */
function createLog(level: Settings["logLevel"]) {
  const write = (line: Line) => {
    const text = typeof line === "string" ? line : line();
    // Method, tool and path come from outside: no line breaks, no terminal codes.
    process.stderr.write(`${new Date().toISOString()} ${text.replace(/\p{Cc}/gu, "?")}\n`);
  };
  const ignore = () => {};
  return { info: level === "silent" ? ignore : write, debug: level === "debug" ? write : ignore };
}

/** Asks the store at most once a second: whoever can reach the server can reach `/healthz`. */
function createHealthCheck(store: TaskStore): () => Promise<boolean> {
  let askedAt = 0;
  let answer = Promise.resolve(true);
  return () => {
    if (Date.now() - askedAt > 1_000) {
      askedAt = Date.now();
      answer = store.check().then(() => true, () => false);
    }
    return answer;
  };
}

/**
 * Lets requests in flight finish and refuses new connections. Resolves when the last connection is closed, after 7
 * seconds at most.
 */
export async function stop(server: http.Server): Promise<void> {
  const closed = once(server, "close");
  // Only stops listening. http's own `close` would cut idle connections in the same moment, and with them the
  // requests that are just on their way; so they get a moment to arrive, and are answered with Connection: close.
  net.Server.prototype.close.call(server);
  // After reading what has come in meanwhile: a connection with a request that nobody has read looks idle, too.
  const closeIdle = setInterval(() => setImmediate(() => server.closeIdleConnections()), 250);
  const closeAll = setTimeout(() => server.closeAllConnections(), 7_000);
  await closed;
  clearInterval(closeIdle);
  clearTimeout(closeAll);
}

async function main() {
  const real = { ...process.env };
  try {
    process.loadEnvFile();
  } catch {
    // No .env: the environment alone, then.
  }
  process.stderr.on("error", () => {}); // whoever reads the log may go away: to log that would fail again
  const settings = readSettings({ ...process.env, ...real }); // Deno's loadEnvFile overwrites what is set
  const log = createLog(settings.logLevel);
  const store = await openTaskStore(settings.databaseUrl, log.info);
  const server = createServer(settings, store);
  const { host, serverUrl, issuer } = settings;
  try {
    await once(server.listen(settings.port, host), "listening");
  } catch (error) {
    const isTaken = error instanceof Error && "code" in error && error.code === "EADDRINUSE";
    const why = isTaken ? "the port is in use. Set PORT to another" : reason(error);
    throw new Error(`Cannot listen on ${host}:${settings.port}: ${why}`);
  }
  // A mistake in one user's tool call must not end the service of all others.
  for (const event of ["uncaughtException", "unhandledRejection"] as const) {
    process.on(event, (error: unknown) => log.info(`Unexpected, and survived: ${reason(error)}`));
  }
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.once(signal, async () => {
      log.info(`Stopping on ${signal}`);
      await stop(server);
      await store.close();
      process.exit();
    });
  }

  const { port } = server.address() as net.AddressInfo;
  log.info(`Listening on ${host}:${port} for ${serverUrl}, with users from ${issuer}`);
}

const isMain = process.argv[1] !== undefined &&
  realpathSync(process.argv[1]) === fileURLToPath(import.meta.url);
if (isMain) {
  await main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
    process.exit(1);
  });
}
