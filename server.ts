/**
 * An MCP server that signs ChatGPT users in through Auth0. One request's path:
 *
 *   HTTP request -> `handle` (this file): Origin, route
 *                -> `authenticate` (auth.ts): who is it?
 *                -> `serveMcp` (this file): the message through a fresh MCP server
 *                -> a tool (tools.ts): what may they do, with whose tasks?
 *                -> HTTP reply
 *
 * Left out: TLS, rate limits and address lists, which are a proxy's work; sessions and event streams, since every
 * request is answered by itself, in JSON.
 */
import { once } from "node:events";
import { existsSync, readFileSync, realpathSync } from "node:fs";
import * as http from "node:http";
import { parseEnv } from "node:util";
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

/** The environment. A message says which rule a value breaks, and the description what it must be. */
export const environment = z.object({
  AUTH0_DOMAIN: z.string("is missing")
    .refine((text) => !text.startsWith("your-tenant."), rule("is missing (this is the README's example)"))
    .refine((text) => !text.includes("://") || isLocal(text), rule("begins with a scheme")) // which the stand-in has
    .refine((text) => !text.replace("://", "").includes("/"), rule("holds a slash"))
    .refine((text) => !/[A-Z]/.test(text), rule("holds a capital letter"))
    .refine((text) => /^([a-z\d-]+\.)+[a-z][a-z\d-]+$/.test(text) || isOrigin(text), rule("is no domain"))
    .describe("the tenant's domain and nothing else, such as acme.us.auth0.com"),
  MCP_SERVER_URL: z.string("is missing")
    .refine((text) => URL.canParse(text), rule("is no URL"))
    .refine((text) => new URL(text).hostname !== "your-domain.com", rule("is missing (this is the README's example)"))
    .refine((text) => text.startsWith("https:") || isLocal(text), rule("is not https"))
    .refine((text) => !/[?#]/.test(text), rule("has a query or a fragment"))
    .refine((text) => new URL(text).pathname !== "/", rule("has no path"))
    .refine((text) => !text.endsWith("/"), rule("ends in a slash"))
    // Clients send the URL as a parser writes it, and Auth0 compares characters.
    .refine((text) => new URL(text).origin + new URL(text).pathname === text, rule("is not in its normal form"))
    .describe(
      "the public URL of the MCP endpoint, such as https://tasks.example.com/mcp: https, a path, no slash at the end, no " +
        "query, the host in lower case and without a default port",
    ),
  PORT: z.string().regex(/^[1-9]\d{0,4}$/, rule("is no port number")).transform(Number)
    .refine((port) => port <= 65_535, "is too large").default(3000).describe("a port number, 1 to 65535"),
  HOST: z.string().default("127.0.0.1"),
  DATABASE_URL: databaseUrlSchema,
  ENFORCE_SCOPES: z.enum(["true", "false"], "is no boolean").default("false").transform((text) => text === "true")
    .describe("true or false"),
  ALLOWED_ORIGINS: z.string().default("").transform((text) => text.split(",").map((one) => one.trim()).filter(Boolean))
    .refine((origins) => origins.every(isOrigin), "holds what is no origin")
    .describe("origins such as https://example.com, comma separated: no path, no slash, lower case"),
  OPENAI_APPS_CHALLENGE: z.string().optional(),
  LOG_LEVEL: z.enum(["silent", "info", "debug"], "is no log level").default("info").describe("silent, info or debug"),
});

/** `issuer` is the tenant as tokens name it: `https://<domain>/`. */
export type Settings = z.output<typeof environment> & { issuer: string };

/** The first rule that is broken ends the check: one line a value. */
function rule(error: string) {
  return { error, abort: true };
}

/** Whether a URL leads to this machine. */
function isLocal(url: string): boolean {
  return URL.canParse(url) && /^https?:\/\/(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/.test(new URL(url).origin);
}

/** Of any scheme, as browsers send it. */
function isOrigin(text: string): boolean {
  return /^[a-z][a-z\d+.-]*:\/\/[^\s/?#@A-Z]+$/.test(text);
}

type Environment = Record<string, string | undefined>;

/**
 * Reads the settings. A variable that is set to nothing counts as not set.
 *
 * @throws {Error} A line for each value that is missing or malformed: its name, the rule it breaks, what it must be.
 */
export function readSettings(env: Environment): Settings {
  const given = Object.fromEntries(Object.entries(env).filter(([, text]) => text));
  const { success, data, error } = environment.safeParse(given);
  if (success) {
    return { ...data, issuer: `${data.AUTH0_DOMAIN.includes("://") ? "" : "https://"}${data.AUTH0_DOMAIN}/` };
  }
  const lines = error.issues.map(({ path, message }) => {
    const name = path[0] as keyof typeof environment.shape;
    return `${name} ${message}: it must be ${environment.shape[name].description}`;
  });
  throw new Error(lines.join("\n"));
}

/** The environment over `.env` in the working directory, and a line for each name that they set to different values. */
export function readEnvironment(): { env: Environment; differences: string[] } {
  const text = existsSync(".env") ? readFileSync(".env", "utf8") : "";
  const env: Environment = parseEnv(text.replace(/^\uFEFF/, "")); // a byte order mark
  const differences: string[] = [];
  for (const [name, value] of Object.entries(process.env)) {
    if (!value) continue; // set to nothing counts as not set
    if (env[name] && env[name] !== value) {
      const mayBeSecret = !(name in environment.shape) || name === "DATABASE_URL" || name === "OPENAI_APPS_CHALLENGE";
      const values = mayBeSecret ? "" : `: '${value}', not '${env[name]}'`;
      differences.push(`${name} differs from .env, and the environment's value counts${values}`);
    }
    env[name] = value;
  }
  return { env, differences };
}

// ------------------------------------------------------------------------------------------------------ HTTP

const MAX_BODY_BYTES = 1024 * 1024;

const LIMITS: http.ServerOptions = {
  headersTimeout: 10_000, // milliseconds, and so below
  requestTimeout: 30_000,
  keepAliveTimeout: 65_000, // longer than the 60 s of common proxies, so that none sends on a closed connection
};

interface Reply {
  status: number;
  headers?: Record<string, string>;
  /** Text is sent as it is, and anything else as JSON. */
  body?: unknown;
  /** For the log: what was called. */
  call?: string;
  /** For the log: who called. */
  caller?: Caller;
  /** For the log: why it was refused. */
  refusal?: string;
}

/** @param signal Aborted when the client has gone. */
type Route = (request: http.IncomingMessage, signal: AbortSignal) => Promise<Reply>;

/**
 * Makes the server, not yet listening, so that tests can start the real one on a port of their own.
 *
 * @param store Stays the caller's to close.
 */
export function createServer(settings: Settings, store: TaskStore): http.Server {
  const { issuer, MCP_SERVER_URL: url, ENFORCE_SCOPES: enforceScopes } = settings;
  const log = createLog(settings.LOG_LEVEL);
  const resource = { issuer, url, name: RESOURCE_NAME, scopes: requestedScopes(enforceScopes) };
  const authenticate = createAuthenticator(resource, log);
  const createMcpServer = createMcpServerFactory({ resource, enforceScopes, store, warn: log });

  const metadata = readOnly(() => protectedResourceMetadata(resource));
  const routes = new Map<string, Route>([
    [pathOf(url), serveMcp],
    [pathOf(metadataUrl(url)), metadata],
    ["/.well-known/oauth-protected-resource", metadata],
    ["/health", readOnly(checkHealth)],
    ["/", readOnly(() => welcome(settings))],
  ]);
  const appsChallenge = settings.OPENAI_APPS_CHALLENGE;
  if (appsChallenge) routes.set("/.well-known/openai-apps-challenge", readOnly(() => appsChallenge));
  const origins = new Set([new URL(url).origin, "https://chatgpt.com", ...settings.ALLOWED_ORIGINS]);

  async function handle(request: http.IncomingMessage, response: http.ServerResponse, signal: AbortSignal) {
    const route = routes.get(pathOf(request.url));
    const { origin } = request.headers;
    if (route === metadata) {
      response.setHeader("Access-Control-Allow-Origin", "*");
    } else if (origin !== undefined) {
      // A page in the user's browser must not reach a server it was not meant for (MCP, Streamable HTTP, Security).
      const isAllowed = origins.has(origin) || isLocal(origin);
      if (!isAllowed) throw new HttpError(403, `Origin ${origin} is not allowed: add it to ALLOWED_ORIGINS`);
      response.setHeader("Access-Control-Allow-Origin", origin);
      response.setHeader("Vary", "Origin");
    }
    response.setHeader("Access-Control-Expose-Headers", "WWW-Authenticate, Mcp-Session-Id, MCP-Protocol-Version");
    if (route === undefined) throw new HttpError(404, `Nothing is served here. The MCP endpoint is ${url}`);
    return request.method === "OPTIONS" ? preflight(request) : await route(request, signal);
  }

  async function serveMcp(request: http.IncomingMessage, signal: AbortSignal): Promise<Reply> {
    const [authorization, ...others] = new Set(request.headersDistinct.authorization);
    if (others.length > 0) throw new HttpError(400, "Two different Authorization headers: send one");
    const caller = await authenticate(authorization);
    return { ...await exchangeMessage(request, caller, signal).catch(refuse), caller };
  }

  async function exchangeMessage(request: http.IncomingMessage, caller: Caller, signal: AbortSignal): Promise<Reply> {
    if (request.method !== "POST") throw new HttpError(405, "Only POST is served here", { Allow: "POST" });

    const body = parseJson(await readBody(request));
    const message = readMessage(body);
    if (message === undefined) {
      const id = z.union([z.string(), z.number()]).safeParse(body?.id).data;
      const [code, text] = body === undefined
        ? [mcp.ErrorCode.ParseError, "Parse error: the body is not JSON in UTF-8"]
        : [mcp.ErrorCode.InvalidRequest, "Invalid Request: the body must be one JSON-RPC 2.0 message, and no batch"];
      return refuse(new HttpError(400, text), code, id);
    }
    checkProtocolVersion(request, message);

    const mcpServer = createMcpServer(caller);
    const transport = new PostTransport();
    await mcpServer.connect(transport);
    signal.throwIfAborted();
    // Closed only where the client has gone: after its reply a server holds nothing, and closing costs 10 % of a call.
    signal.addEventListener("abort", () => void mcpServer.close());
    const reply = await transport.exchange(message);
    return { status: reply === undefined ? 202 : 200, body: reply, call: nameOf(message) };
  }

  async function checkHealth(): Promise<string> {
    if (!server.listening) throw new HttpError(503, "The server is stopping");
    await store.check().catch((error: unknown) => {
      throw new HttpError(503, "The database does not answer", {}, error);
    });
    return "ok\n";
  }

  const server = http.createServer(LIMITS, async (request, response) => {
    const started = performance.now();
    const gone = new AbortController();
    response.on("close", () => {
      if (!response.writableFinished) gone.abort();
    });
    request.on("error", () => gone.abort()); // its body broke off; on Deno the response closes only later
    const reply = await handle(request, response, gone.signal).catch(refuse);
    const isGone = gone.signal.aborted;
    if (!isGone) send(response, reply);
    request.resume(); // what is left of a refused body: a client that is still sending would not see the answer

    const { call, caller, refusal } = reply;
    const isRefused = refusal !== undefined && !isGone;
    if (!isRefused && settings.LOG_LEVEL !== "debug") return; // the line is not made for nothing
    const status = isGone ? "the client has gone after" : reply.status;
    const time = `${Math.round(performance.now() - started)} ms`;
    const why = refusal ?? JSON.stringify(caller?.claims);
    log([request.method, pathOf(request.url), call, status, time, caller?.subject, why].filter(Boolean).join(" "));
  });
  server.timeout = 120_000; // milliseconds without a byte either way: who never reads a reply holds no socket for ever
  return server;
}

/** A refusal as MCP's clients read it: a JSON-RPC error. */
function refuse(error: unknown, code = -32000, id: string | number | null = null): Reply {
  const { status, headers, message } = error instanceof HttpError
    ? error
    : new HttpError(500, "The server failed; its log says why");
  return { status, headers, body: { jsonrpc: "2.0", error: { code, message }, id }, refusal: describeError(error) };
}

function send(response: http.ServerResponse, { status, body, headers = {} }: Reply) {
  const isText = typeof body === "string";
  response.statusCode = status;
  response.setHeader("Cache-Control", "no-store"); // a cached challenge or document would outlive its setting
  if (body !== undefined) response.setHeader("Content-Type", isText ? "text/plain; charset=utf-8" : "application/json");
  for (const [name, value] of Object.entries(headers)) response.setHeader(name, value);
  response.end(isText ? body : JSON.stringify(body));
}

/** The path to route by: no query, since it may hold a token, no doubled slashes, and none at the end. */
function pathOf(target = "/"): string {
  const url = target.startsWith("/") ? `http://localhost${target}` : target; // or in absolute form (RFC 9112 §3.2.2)
  return URL.canParse(url) ? `/${new URL(url).pathname.split("/").filter(Boolean).join("/")}` : "";
}

/** @param show Returns the body. */
function readOnly(show: () => unknown): Route {
  return async ({ method }) => {
    if (method !== "GET" && method !== "HEAD") {
      throw new HttpError(405, "Only GET is served here", { Allow: "GET, HEAD" });
    }
    return { status: 200, body: await show() };
  };
}

function welcome({ MCP_SERVER_URL, issuer }: Settings): string {
  return `An MCP server for ChatGPT, with users signed in through Auth0 (${issuer}).

Paste this URL into ChatGPT, or give it to another MCP client (README, Step 7):

  ${MCP_SERVER_URL}
`;
}

/** Allows pages of an allowed origin to send what they like: the token decides. */
function preflight({ headers }: http.IncomingMessage): Reply {
  return {
    status: 204,
    headers: {
      "Access-Control-Allow-Methods": "GET, POST, DELETE",
      "Access-Control-Allow-Headers": headers["access-control-request-headers"] ?? "",
      "Access-Control-Max-Age": "86400",
    },
  };
}

async function readBody(request: http.IncomingMessage): Promise<Buffer> {
  const { "content-type": type = "", "content-encoding": encoding = "identity" } = request.headers;
  if (!/^application\/json\s*(;|$)/i.test(type)) throw new HttpError(415, "Content-Type must be application/json");
  if (!/^identity$/i.test(encoding)) throw new HttpError(415, `Content-Encoding ${encoding} is not read here`);
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of request.iterator({ destroyOnReturn: false })) { // the answer still has to go out
    size += chunk.length;
    if (size > MAX_BODY_BYTES) throw new HttpError(413, `The body must not exceed ${MAX_BODY_BYTES} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

/** Undefined where it is no JSON. */
function parseJson(bytes: Buffer): Unchecked {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)); // which drops a byte order mark
  } catch {
    return undefined;
  }
}

// ------------------------------------------------------------------------------------------------------- MCP

/**
 * The SDK's `Transport` over one POST: one message in, and one reply out if it was a request.
 *
 * A stateless server that answers in JSON needs no more. The SDK's own HTTP transport would also do sessions, event
 * streams and resumption; it goes through the web's Request and Response, which doubles the CPU of a call.
 * Notifications that a tool sends on the way have nowhere to go and are dropped.
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

  /** Hands a message to the server. Resolves with the reply to a request, and at once with nothing otherwise. */
  exchange(message: mcp.JSONRPCMessage): Promise<mcp.JSONRPCMessage | undefined> {
    return new Promise((resolve) => {
      this.#settle = resolve;
      this.onmessage?.(message);
      if (!("method" in message && "id" in message)) resolve(undefined);
    });
  }
}

/** Any JSON, and what is read of it before it is checked: of a number or a string these properties are undefined. */
type Unchecked = { id?: unknown; params?: { arguments?: unknown } | null } | null | undefined;

/** Undefined where it is no message. Some clients send null for what they leave out. */
function readMessage(body: Unchecked): mcp.JSONRPCMessage | undefined {
  if (body?.params === null) delete body.params;
  if (body?.params?.arguments === null) delete body.params.arguments;
  return mcp.JSONRPCMessageSchema.safeParse(body).data;
}

/** Answers as the SDK's transport does: on its very text newer clients fall back to a revision that it speaks. */
function checkProtocolVersion({ headers }: http.IncomingMessage, message: mcp.JSONRPCMessage) {
  const header = headers["mcp-protocol-version"];
  if (header === undefined || ("method" in message && message.method === "initialize")) return;
  const given = [...new Set(String(header).split(/\s*,\s*/))].join(", "); // Node joins repeated headers: once is enough
  if (mcp.SUPPORTED_PROTOCOL_VERSIONS.includes(given)) return;
  const supported = mcp.SUPPORTED_PROTOCOL_VERSIONS.join(", ");
  throw new HttpError(400, `Bad Request: Unsupported protocol version: ${given} (supported versions: ${supported})`);
}

/** For the log: the method, and the name of what it calls. */
function nameOf(message: mcp.JSONRPCMessage): string {
  if (!("method" in message)) return "reply";
  const name = message.params?.name; // whatever the client sent: only a string can be printed
  return `${message.method} ${typeof name === "string" ? name : ""}`.trim().slice(0, 200);
}

// ----------------------------------------------------------------------------------------------- start, stop

/** One line an event, to stderr. Method, tool and path come from outside: no line breaks, no terminal codes. */
function createLog(level: Settings["LOG_LEVEL"]): (line: string) => void {
  if (level === "silent") return () => {};
  return (line) => {
    process.stderr.write(`${new Date().toISOString()} ${line.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "?")}\n`);
  };
}

/** Refuses new connections and lets requests in flight finish. Resolves when all are closed, after 7 s at most. */
export async function stop(server: http.Server): Promise<void> {
  const closed = once(server, "close");
  server.close();
  const closeIdle = setInterval(() => server.closeIdleConnections(), 250); // those whose request has been answered
  const closeAll = setTimeout(() => server.closeAllConnections(), 7_000);
  await closed;
  clearInterval(closeIdle);
  clearTimeout(closeAll);
}

async function main() {
  process.stderr.on("error", () => {}); // whoever reads the log may go away: to log that would fail again
  const { env, differences } = readEnvironment();
  const settings = readSettings(env);
  const log = createLog(settings.LOG_LEVEL);
  for (const line of differences) log(line);
  const store = await openTaskStore(settings.DATABASE_URL, log);
  const server = createServer(settings, store);
  // A promise that nobody awaited is a mistake in one call, and no reason to end the others.
  process.on(
    "unhandledRejection",
    (error) => log(`A promise failed that nobody awaited: ${describeError(error)}`),
  );
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.once(signal, async () => {
      log(`Stopping on ${signal}`);
      setTimeout(() => process.exit(), 9_000); // even if the database does not let go
      await stop(server);
      await store.close();
      process.exit();
    });
  }
  const { HOST, PORT, MCP_SERVER_URL, issuer } = settings;
  await once(server.listen(PORT, HOST), "listening");
  log(`Listening on ${HOST}:${PORT} for ${MCP_SERVER_URL}, with users from ${issuer}`);
}

if (process.argv[1] !== undefined && realpathSync(process.argv[1]) === import.meta.filename) {
  await main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
    process.exit(1);
  });
}
