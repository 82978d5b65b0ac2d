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
import type { AddressInfo } from "node:net";
import { fileURLToPath } from "node:url";
import { parseEnv } from "node:util";
// @ts-types="@modelcontextprotocol/sdk/shared/mediaType"
import { isJsonContentType } from "@modelcontextprotocol/sdk/shared/mediaType.js";
// @ts-types="@modelcontextprotocol/sdk/shared/transport"
import type { Transport } from "@modelcontextprotocol/sdk/shared/transport.js";
// @ts-types="@modelcontextprotocol/sdk/types"
import * as mcp from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";
import { AuthError, createAuthenticator, metadataUrl, protectedResourceMetadata, reason } from "./auth.ts";
import type { Caller } from "./auth.ts";
import { createMcpServerFactory, databaseUrlSchema, openTaskStore, requestedScopes, RESOURCE_NAME } from "./tools.ts";
import type { TaskStore } from "./tools.ts";

// -------------------------------------------------------------------------------------------------- settings

/** The environment. An error names the first rule that is broken; the description says what a value must be. */
export const environment = z.object({
  AUTH0_DOMAIN: z.string().superRefine(firstBroken({
    "begins with a scheme": (text) => text.includes("://") && !isLocal(text), // the stand-in tenant may
    "holds a slash": (text) => text.replace("://", "").includes("/"),
    "holds a capital letter": (text) => /[A-Z]/.test(text),
    "is no domain": (text) => !/^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$/.test(text) && !isOrigin(text),
  })).describe("the tenant's domain and nothing else, such as your-tenant.us.auth0.com"),
  MCP_SERVER_URL: z.string().superRefine(firstBroken({
    "is no URL": (text) => !URL.canParse(text),
    "is not https": (text) => !text.startsWith("https:") && !isLocal(text),
    "has a query or a fragment": (text) => /[?#]/.test(text),
    "has no path": (text) => new URL(text).pathname === "/",
    "ends in a slash": (text) => text.endsWith("/"),
    "holds a user or a password": (text) => new URL(text).username + new URL(text).password !== "",
    // Clients would write it as a URL parser does, and the tenant compares characters.
    "is not in its normal form": (text) => new URL(text).href !== text,
  })).describe(
    "the public URL of the MCP endpoint, such as https://your-domain.com/mcp: https, a path, no slash at the end, no " +
      "query, the host in lower case and without a default port",
  ),
  PORT: z.string().regex(/^\d{1,5}$/, { error: "is no number", abort: true }).transform(Number)
    .refine((port) => port <= 65_535, "is too large").default(3000).describe("a port number, 0 to 65535"),
  HOST: z.string().default("127.0.0.1"),
  DATABASE_URL: databaseUrlSchema,
  ENFORCE_SCOPES: z.enum(["true", "false"], "is neither").default("false").transform((text) => text === "true")
    .describe("true or false"),
  ALLOWED_ORIGINS: z.string().default("").transform((text) => text.split(",").map((one) => one.trim()).filter(Boolean))
    .refine((origins) => origins.every(isOrigin), "holds what is no origin")
    .describe("origins such as https://example.com, comma separated: no path, no slash, lower case"),
  OPENAI_APPS_CHALLENGE: z.string().optional(),
  LOG_LEVEL: z.enum(["silent", "info", "debug"], "is none of them").default("info").describe("silent, info or debug"),
});

const settingsSchema = environment.transform((env) => ({
  /** `https://<AUTH0_DOMAIN>/`. */
  issuer: env.AUTH0_DOMAIN.includes("://") ? `${env.AUTH0_DOMAIN}/` : `https://${env.AUTH0_DOMAIN}/`,
  serverUrl: env.MCP_SERVER_URL,
  port: env.PORT,
  host: env.HOST,
  databaseUrl: env.DATABASE_URL,
  enforceScopes: env.ENFORCE_SCOPES,
  allowedOrigins: env.ALLOWED_ORIGINS,
  openaiAppsChallenge: env.OPENAI_APPS_CHALLENGE,
  logLevel: env.LOG_LEVEL,
}));
export type Settings = z.output<typeof settingsSchema>;

type Environment = Record<string, string | undefined>;

/**
 * Reads the settings. A variable that is set to nothing, or to the README's example, counts as not set.
 *
 * @throws {Error} A line for each value that is missing or malformed: its name, the rule it breaks, what it must be.
 */
export function readSettings(env: Environment): Settings {
  const isExample = (text: string) => /^your-tenant\.|^https:\/\/your-domain\.com\b/.test(text);
  const given = Object.fromEntries(Object.entries(env).filter(([, text]) => text && !isExample(text)));
  const { success, data, error } = settingsSchema.safeParse(given);
  if (success) return data;
  const lines = error.issues.map(({ path, message }) => {
    const name = path[0] as keyof typeof environment.shape;
    const found = given[name] === undefined
      ? `missing${env[name] ? `, since '${env[name]}' is the README's example` : ""}`
      : `${mayBeSecret(name) ? "set, but" : `'${given[name]}', which`} ${message}`;
    return `${name} is ${found}: it must be ${environment.shape[name].description}`;
  });
  throw new Error(lines.join("\n"));
}

/**
 * Reads `.env` in the working directory under the real environment, which wins. In both, set to nothing is not set.
 *
 * @returns The two in one, and a line for each name that they set to different values.
 */
export function readEnvironment(): { env: Environment; differences: string[] } {
  const text = existsSync(".env") ? readFileSync(".env", "utf8").replace(/^\uFEFF/, "") : "";
  const isSet = ([, value]: [string, unknown]) => value !== "";
  const real: Environment = Object.fromEntries(Object.entries(process.env).filter(isSet));
  const file: Environment = Object.fromEntries(Object.entries(parseEnv(text)).filter(isSet));
  const differing = Object.keys(file).filter((name) => real[name] !== undefined && real[name] !== file[name]);
  const differences = differing.map((name) => {
    const [counts, other] = mayBeSecret(name) ? ["", ""] : [` '${real[name]}'`, ` '${file[name]}'`];
    return `${name}: the environment's value${counts} counts, not${other || " that"} of .env`;
  });
  return { env: { ...file, ...real }, differences };
}

/** Whether a value may be none for the log. */
function mayBeSecret(name: string): boolean {
  return !(name in environment.shape) || name === "DATABASE_URL" || name === "OPENAI_APPS_CHALLENGE";
}

function firstBroken(rules: Record<string, (text: string) => boolean>) {
  return (text: string, { addIssue }: z.RefinementCtx) => {
    const broken = Object.entries(rules).find(([, isBroken]) => isBroken(text));
    if (broken) addIssue(broken[0]);
  };
}

/** Whether a URL leads to this machine. */
function isLocal(url: string): boolean {
  return URL.canParse(url) && /^https?:\/\/(localhost|127(\.\d+){3}|\[::1\])(:\d+)?$/.test(new URL(url).origin);
}

/** Of any scheme, as browsers send it. */
function isOrigin(text: string): boolean {
  return /^[a-z][a-z\d+.-]*:\/\/[^\s/?#@A-Z]+$/.test(text);
}

// ------------------------------------------------------------------------------------------------------ HTTP

const MAX_BODY_BYTES = 1024 * 1024;

const LIMITS: http.ServerOptions = {
  maxHeaderSize: 16 * 1024, // bytes; a token of Auth0's has 1 to 2 KiB
  headersTimeout: 10_000, // milliseconds, and so below
  requestTimeout: 30_000,
  keepAliveTimeout: 65_000, // proxies keep idle connections for 60 s: closed earlier, one could be in use again
  connectionsCheckingInterval: 5_000,
};

/** A request refused for what it is as HTTP. The message is for whoever wrote the client. */
class HttpError extends Error {
  readonly status: number;
  readonly headers: Record<string, string>;
  /** `code` and `id` of the JSON-RPC error in the body. */
  readonly code: number;
  readonly id: string | number | null;

  constructor(status: number, message: string, { headers = {}, code = -32000, id = null }: Partial<HttpError> = {}) {
    super(message);
    this.status = status;
    this.headers = headers;
    this.code = code;
    this.id = id;
  }
}

interface Reply {
  status: number;
  headers?: Record<string, string>;
  /** Text is sent as it is, and anything else as JSON. */
  body?: unknown;
  /** For the log: the MCP method, who called, why it was refused. */
  call?: string;
  caller?: Caller;
  refusal?: string;
}

/** @param signal Aborted when the client has gone. */
type Route = (request: http.IncomingMessage, signal: AbortSignal) => Reply | Promise<Reply>;

/**
 * Makes the server, not yet listening, so that tests can start the real one on a port of their own.
 *
 * @param store Stays the caller's to close.
 */
export function createServer(settings: Settings, store: TaskStore): http.Server {
  const { issuer, serverUrl, enforceScopes, openaiAppsChallenge } = settings;
  const log = createLog(settings.logLevel);
  const resource = { issuer, url: serverUrl, name: RESOURCE_NAME, scopes: requestedScopes(enforceScopes) };
  const authenticate = createAuthenticator(resource, log.info);
  const createMcpServer = createMcpServerFactory({ resource, enforceScopes, warn: log.info });

  const metadata = readOnly(() => ({ status: 200, body: protectedResourceMetadata(resource) }));
  const routes = new Map<string, Route>([
    [normalPath(new URL(serverUrl).pathname), serveMcp],
    [normalPath(new URL(metadataUrl(serverUrl)).pathname), metadata],
    ["/.well-known/oauth-protected-resource", metadata],
    ["/.well-known/openai-apps-challenge", readOnly(showAppsChallenge)],
    ["/health", readOnly(checkHealth)],
    ["/", readOnly(() => ({ status: 200, body: welcome(settings) }))],
  ]);
  const origins = new Set([new URL(serverUrl).origin, "https://chatgpt.com", ...settings.allowedOrigins]);

  async function handle(request: http.IncomingMessage, response: http.ServerResponse, signal: AbortSignal) {
    const route = routes.get(pathOf(request));
    const { origin } = request.headers;
    if (route === metadata) response.setHeader("Access-Control-Allow-Origin", "*");
    else if (origin !== undefined) {
      // A page in the user's browser must not reach a server it was not meant for (MCP, Streamable HTTP, Security).
      const message = `Origin ${origin} is not allowed: add it to ALLOWED_ORIGINS`;
      if (!origins.has(origin) && !isLocal(origin)) throw new HttpError(403, message);
      response.setHeader("Access-Control-Allow-Origin", origin);
      response.setHeader("Vary", "Origin");
    }
    response.setHeader("Access-Control-Expose-Headers", "WWW-Authenticate, Mcp-Session-Id, MCP-Protocol-Version");
    if (route === undefined) throw new HttpError(404, `Nothing is served here. The MCP endpoint is ${serverUrl}`);
    return request.method === "OPTIONS" ? preflight(request) : route(request, signal);
  }

  async function serveMcp(request: http.IncomingMessage, signal: AbortSignal): Promise<Reply> {
    const [authorization, ...others] = new Set(request.headersDistinct.authorization);
    if (others.length > 0) throw new HttpError(400, "Two different Authorization headers: one of them is not meant");
    const caller = await authenticate(authorization);
    if (request.method !== "POST") throw new HttpError(405, "Only POST is served here", { headers: { Allow: "POST" } });
    const message = readMessage(await readJson(request));
    checkProtocolVersion(request, message);
    signal.throwIfAborted();

    const server = createMcpServer(caller, store);
    const transport = new PostTransport();
    await server.connect(transport);
    // Closed only where the client has gone: after its reply a server holds nothing, and closing costs 10 % of a call.
    signal.addEventListener("abort", () => void server.close());
    const body = await transport.exchange(message);
    return { status: body === undefined ? 202 : 200, body, call: nameOf(message), caller };
  }

  async function checkHealth(): Promise<Reply> {
    const isUp = server.listening && await store.check().then(() => true, () => false);
    return isUp ? { status: 200, body: "ok\n" } : { status: 503, body: "not ok\n" };
  }

  function showAppsChallenge(): Reply {
    if (openaiAppsChallenge === undefined) throw new HttpError(404, "OPENAI_APPS_CHALLENGE is not set");
    return { status: 200, body: openaiAppsChallenge };
  }

  const server = http.createServer(LIMITS, async (request, response) => {
    const started = performance.now();
    const gone = new AbortController();
    response.on("close", () => response.writableFinished || gone.abort());
    request.on("error", () => gone.abort()); // its body broke off; on Deno the response closes only later
    const reply = await handle(request, response, gone.signal).catch(refuse);
    if (!gone.signal.aborted) send(response, reply);
    request.resume(); // what is left of a refused body: a client that is still sending would not see the answer

    const { caller, call, refusal } = reply;
    const [status, why] = gone.signal.aborted ? ["cut off", "the client has gone"] : [reply.status, refusal];
    const write = gone.signal.aborted || refusal === undefined ? log.debug : log.info;
    write(() => {
      const time = `${Math.round(performance.now() - started)} ms`;
      const who = caller && [caller.subject, JSON.stringify(caller.claims)];
      return [request.method, pathOf(request), call, status, time, who, why].flat().filter(Boolean).join(" ");
    });
  });
  server.timeout = 120_000; // milliseconds without a byte either way: who never reads a reply holds no socket for ever
  return server;
}

/** A refusal as MCP's clients read it: a JSON-RPC error. */
function refuse(error: unknown): Reply {
  const refusal = reason(error);
  if (error instanceof HttpError || error instanceof AuthError) {
    const { code, id } = error instanceof HttpError ? error : { code: -32000, id: null };
    const body = { jsonrpc: "2.0", error: { code, message: error.message }, id };
    return { status: error.status, headers: error.headers, body, refusal };
  }
  const failure = { code: mcp.ErrorCode.InternalError, message: "The server failed; its log says why" };
  return { status: 500, body: { jsonrpc: "2.0", error: failure, id: null }, refusal };
}

function send(response: http.ServerResponse, { status, body, headers = {} }: Reply) {
  if (body === undefined) {
    response.writeHead(status, headers).end();
    return;
  }
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

/** The path to route by, without doubled slashes and one at the end; never the query, since tokens there would be logged. */
function pathOf({ url = "/" }: http.IncomingMessage): string {
  const target = url.startsWith("/") ? `http://localhost${url}` : url; // or in absolute form (RFC 9112 §3.2.2)
  return URL.canParse(target) ? normalPath(new URL(target).pathname) : url.split("?", 1).join();
}

function normalPath(path: string): string {
  return path.replace(/\/{2,}/g, "/").replace(/(?<=.)\/$/, "");
}

function readOnly(show: () => Reply | Promise<Reply>): Route {
  return ({ method }) => {
    if (method === "GET" || method === "HEAD") return show();
    throw new HttpError(405, "Only GET is served here", { headers: { Allow: "GET, HEAD" } });
  };
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

function welcome({ serverUrl, issuer }: Settings): string {
  const use = isLocal(serverUrl) ? "Give this URL to an MCP client on this machine" : "Paste this URL into ChatGPT";
  return `An MCP server for ChatGPT, with users signed in through Auth0.

${use} (README, Step 7):

  ${serverUrl}

Who signs users in: ${issuer}
What a client reads first: ${metadataUrl(serverUrl)}
`;
}

async function readJson(request: http.IncomingMessage): Promise<unknown> {
  const { "content-type": type, "content-encoding": encoding = "identity" } = request.headers;
  if (!isJsonContentType(type)) throw new HttpError(415, "Content-Type must be application/json");
  if (encoding.toLowerCase() !== "identity") {
    throw new HttpError(415, `Content-Encoding ${encoding} is not read here: send the body as it is`);
  }
  const body = await readBody(request);
  try {
    return JSON.parse(new TextDecoder().decode(body)); // which drops a byte order mark
  } catch {
    throw new HttpError(400, "Parse error: the body is not JSON", { code: mcp.ErrorCode.ParseError });
  }
}

/** @throws {Error} When the client has gone, even if that was before this was called. */
async function readBody(request: http.IncomingMessage): Promise<Buffer> {
  const expectAtMost = (size: number) => {
    if (size > MAX_BODY_BYTES) throw new HttpError(413, `The body must not exceed ${MAX_BODY_BYTES} bytes`);
  };
  expectAtMost(Number(request.headers["content-length"]));
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of request.iterator({ destroyOnReturn: false })) { // the answer still has to go out
    expectAtMost(size += chunk.length);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
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
  #resolve = (_reply: mcp.JSONRPCMessage | undefined) => {};
  #reject = (_error: Error) => {};

  async start() {}

  async send(message: mcp.JSONRPCMessage) {
    if (!("method" in message)) this.#resolve(message);
  }

  async close() {
    this.#reject(new Error("The client has gone"));
    this.onclose?.();
  }

  /** Hands a message to the server. Resolves with the reply to a request, and at once with nothing otherwise. */
  exchange(message: mcp.JSONRPCMessage): Promise<mcp.JSONRPCMessage | undefined> {
    return new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
      this.onmessage?.(message);
      if (!("method" in message && "id" in message)) resolve(undefined);
    });
  }
}

function readMessage(body: unknown): mcp.JSONRPCMessage {
  const fields = isRecord(body) ? body : {};
  // Some clients send null for what they leave out.
  if (fields.params === null) delete fields.params;
  if (isRecord(fields.params) && fields.params.arguments === null) delete fields.params.arguments;
  const { success, data } = mcp.JSONRPCMessageSchema.safeParse(fields);
  if (success) return data;
  const { id } = fields;
  throw new HttpError(
    400,
    Array.isArray(body)
      ? "Invalid Request: a batch, which MCP has not had since revision 2025-06-18. Send one message a POST"
      : "Invalid Request: the body is JSON, but no JSON-RPC 2.0 message",
    { code: mcp.ErrorCode.InvalidRequest, id: typeof id === "string" || typeof id === "number" ? id : null },
  );
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Answers as the SDK's transport does: on its very text newer clients fall back to a revision that it speaks. */
function checkProtocolVersion({ headers }: http.IncomingMessage, message: mcp.JSONRPCMessage) {
  const isInitialize = "method" in message && message.method === "initialize";
  const header = headers["mcp-protocol-version"];
  if (isInitialize || header === undefined) return;
  const versions = [...new Set(String(header).split(/\s*,\s*/))]; // Node joins repeated headers
  if (versions.length === 1 && mcp.SUPPORTED_PROTOCOL_VERSIONS.includes(versions[0] ?? "")) return;
  const supported = mcp.SUPPORTED_PROTOCOL_VERSIONS.join(", ");
  throw new HttpError(
    400,
    `Bad Request: Unsupported protocol version: ${versions.join(", ")} (supported versions: ${supported})`,
  );
}

/** For the log: the method, and the tool where one is called. */
function nameOf(message: mcp.JSONRPCMessage): string {
  if (!("method" in message)) return "reply";
  const tool = message.method === "tools/call" ? ` ${message.params?.name}` : "";
  return `${message.method}${tool}`.slice(0, 200);
}

// ----------------------------------------------------------------------------------------------- start, stop

/** One line an event, to stderr. */
function createLog(level: Settings["logLevel"]) {
  const write = (line: string | (() => string)) => {
    const text = typeof line === "string" ? line : line();
    // Method, tool and path come from outside: no line breaks, no terminal codes.
    process.stderr.write(`${new Date().toISOString()} ${text.replace(/\p{Cc}/gu, "?")}\n`);
  };
  const ignore = () => {};
  return { info: level === "silent" ? ignore : write, debug: level === "debug" ? write : ignore };
}

/**
 * Refuses new connections and lets requests in flight finish. Resolves when the last connection is closed, after 7
 * seconds at most.
 */
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
  const { host, port, serverUrl, issuer } = settings;
  const log = createLog(settings.logLevel);
  for (const line of differences) log.info(line);
  const store = await openTaskStore(settings.databaseUrl, log.info);
  const server = createServer(settings, store);
  // A promise that nobody awaited is a mistake in one call, and no reason to end the others.
  process.on(
    "unhandledRejection",
    (error) => log.info(`A promise failed that nobody awaited: ${reason(error)}`),
  );
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    process.once(signal, async () => {
      log.info(`Stopping on ${signal}`);
      setTimeout(() => process.exit(), 9_000); // even if the database does not let go
      await stop(server);
      await store.close();
      process.exit();
    });
  }
  try {
    await once(server.listen(port, host), "listening");
  } catch (error) {
    const isTaken = error instanceof Error && "code" in error && error.code === "EADDRINUSE";
    const why = isTaken ? "the port is in use. Set PORT to another" : reason(error);
    throw new Error(`Cannot listen on ${host}:${port}: ${why}`);
  }
  log.info(
    `Listening on ${host}:${(server.address() as AddressInfo).port} for ${serverUrl}, with users from ${issuer}`,
  );
}

const isMain = process.argv[1] !== undefined &&
  realpathSync(process.argv[1]) === fileURLToPath(import.meta.url);
if (isMain) {
  await main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.message : error}\n`);
    process.exit(1);
  });
}
