/** Starts the real server on loopback: inside the test's process, or as a process of its own. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { cp, mkdir, mkdtemp, symlink } from "node:fs/promises";
import type { Server } from "node:http";
import { isBuiltin } from "node:module";
import { type AddressInfo, connect, createServer as createNetServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable } from "node:stream";
import { text } from "node:stream/consumers";
import type { TestContext } from "node:test";
import { createServer, readSettings } from "../../server.ts";
import { openTaskStore, type TaskStore } from "../../tools.ts";

/** The template's directory. */
export const ROOT = join(import.meta.dirname, "../..");

/** The text of one of the template's files. */
export const readTemplate = (path: string) => readFileSync(join(ROOT, path), "utf8");

/**
 * Copies some of the template's files and folders into a new directory, which the caller deletes.
 *
 * @param parent Where to create it.
 * @param without Packages of package.json that cannot be imported there.
 */
export async function copyTemplate(
  paths: string[],
  { parent = tmpdir(), without = [] }: { parent?: string; without?: string[] } = {},
): Promise<string> {
  const directory = await mkdtemp(join(parent, "template-"));
  for (const path of paths) await cp(join(ROOT, path), join(directory, path), { recursive: true });
  const { dependencies, devDependencies } = JSON.parse(readTemplate("package.json"));
  for (const name of Object.keys({ ...dependencies, ...devDependencies })) {
    const link = join(directory, "node_modules", name);
    await mkdir(dirname(link), { recursive: true });
    if (!without.includes(name)) await symlink(join(ROOT, "node_modules", name), link, "junction");
  }
  return directory;
}

/** Flags with which a child process of this runtime reads TypeScript: none where Node does so by itself. */
const RUNTIME_FLAGS = "Deno" in globalThis
  ? ["run", "--no-prompt", "--allow-net", "--allow-env", "--allow-read", "--allow-write"]
  : process.features.typescript
  ? []
  : ["--import", import.meta.resolve("tsx")];

/** Why tests of SQLite are skipped, or false where they run. */
export const noSqlite = !isBuiltin("node:sqlite") && "this runtime has no node:sqlite";

/** A port that is free now. MCP_SERVER_URL holds the port, so it has to be known before the server exists. */
export async function freePort(): Promise<number> {
  const server = createNetServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

export interface RunningServer {
  /** MCP_SERVER_URL */
  url: string;
  port: number;
  store: TaskStore;
  http: Server;
  close(): Promise<void>;
}

/**
 * @param env AUTH0_DOMAIN, and whatever else differs from the test's defaults: tasks in memory, no log.
 * @param store The test's own store, which is closed with the server.
 * @param create Creates a changed server.
 */
export async function startServer(
  env: Record<string, string>,
  store?: TaskStore,
  create = createServer,
): Promise<RunningServer> {
  const port = await freePort();
  const url = env.MCP_SERVER_URL ?? `http://localhost:${port}/mcp`;
  const settings = readSettings({
    DATABASE_URL: "memory:",
    LOG_LEVEL: "silent",
    ...env,
    MCP_SERVER_URL: url,
    PORT: new URL(url).port || String(port),
  });
  const tasks = store ?? await openTaskStore(settings.DATABASE_URL, () => {});
  const server = create(settings, tasks).listen(settings.PORT, settings.HOST);
  await once(server, "listening");
  return {
    url,
    port: settings.PORT,
    store: tasks,
    http: server,
    async close() {
      server.close();
      server.closeAllConnections();
      await tasks.close();
    },
  };
}

/** The lines that servers in this process write to their log from now on, until the test ends. */
export function logOf(t: TestContext): string[] {
  const lines: string[] = [];
  t.mock.method(process.stderr, "write", (line: string) => lines.push(line));
  return lines;
}

/** Of the test's own environment, only PATH and the folder of V8's compile cache. */
function childEnvironment(env: Record<string, string>) {
  const { PATH, NODE_COMPILE_CACHE } = process.env;
  return { PATH, ...(NODE_COMPILE_CACHE !== undefined && { NODE_COMPILE_CACHE }), ...env };
}

/** Runs a script of package.json as a user does: a process of its own, on this runtime, without a terminal. */
export function runCommandLine(
  name: string,
  args: string[] = [],
  { cwd = import.meta.dirname, env = {} }: { cwd?: string; env?: Record<string, string> } = {},
) {
  const { scripts } = JSON.parse(readTemplate("package.json"));
  const command = [...RUNTIME_FLAGS, join(ROOT, scripts[name].replace("tsx ", "")), ...args];
  const child = spawn(process.execPath, command, {
    cwd,
    env: childEnvironment(env),
    stdio: ["ignore", "pipe", "pipe"],
  });
  const outcome = Promise.all([once(child, "close"), text(child.stdout), text(child.stderr)])
    .then(([[status], stdout, stderr]) => ({ status, stdout, stderr }));
  return { child, outcome };
}

export interface ServerProcess {
  pid: number;
  kill(signal: NodeJS.Signals): void;
  /** Its log, for a test that stops reading it. */
  stderr: Readable;
  /** What it has written to stderr so far. */
  lines: string[];
  /** Resolves when it says that it listens, or has ended. */
  ready: Promise<unknown>;
  /** Resolves with the exit status, or the signal that ended it, after all its output. */
  exited: Promise<number | NodeJS.Signals>;
}

/**
 * Runs server.ts as a user would: a process of its own, on the runtime and with the loader that run this file, given
 * its environment and nothing else.
 *
 * @param cwd Where a `.env` would be read.
 * @param script What to run in place of server.ts.
 */
export function spawnServer(
  env: Record<string, string>,
  cwd: string = import.meta.dirname,
  script = `${import.meta.dirname}/../../server.ts`,
): ServerProcess {
  const child = spawn(process.execPath, [...RUNTIME_FLAGS, script], {
    cwd,
    env: childEnvironment(env),
    stdio: ["ignore", "inherit", "pipe"],
  });
  const lines: string[] = [];
  const exited = once(child, "close").then(([code, signal]) => code ?? signal);
  const listening = new Promise((resolve) => {
    createInterface(child.stderr).on("line", (line) => {
      lines.push(line);
      if (line.includes("Listening on")) resolve(line);
    });
  });
  const { pid } = child;
  if (pid === undefined) throw new Error(`${process.execPath} cannot be started`);
  // Not child.kill: Deno would then report the signal in place of the exit status.
  const kill = (signal: NodeJS.Signals) => {
    if (child.exitCode === null && child.signalCode === null) process.kill(pid, signal);
  };
  return { pid, kill, stderr: child.stderr, lines, ready: Promise.race([listening, exited]), exited };
}

export interface Reply {
  status: number;
  head: string;
  body: Buffer;
}

/**
 * A keep-alive connection that carries one request at a time: for requests that fetch would correct, and for the bench,
 * since node:http's client takes more CPU than the servers that are measured with it.
 *
 * Reads replies with a Content-Length, and of others the head.
 */
export class Connection {
  /** For writing a request in parts. A disconnect is not an error. */
  readonly socket: Socket;
  #received: Buffer = Buffer.alloc(0);
  #settle: { resolve: (reply: Reply) => void; reject: (error: Error) => void } | undefined;

  constructor(port: number) {
    this.socket = connect(port, "127.0.0.1").setNoDelay();
    this.socket.on("data", (chunk: Buffer) => {
      this.#received = this.#received.length === 0 ? chunk : Buffer.concat([this.#received, chunk]);
      this.#read();
    });
    this.socket.on("error", () => {}); // "close" follows
    this.socket.on("close", () => this.#settle?.reject(new Error("The server has closed the connection")));
  }

  send(request: Buffer | string): Promise<Reply> {
    return new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
      this.socket.write(request);
    });
  }

  #read() {
    const headLength = this.#received.indexOf("\r\n\r\n");
    if (headLength === -1) return;
    const head = this.#received.toString("latin1", 0, headLength);
    const bodyLength = Number(/^content-length: (\d+)$/im.exec(head)?.[1]);
    const body = this.#received.subarray(headLength + 4);
    if (body.length < bodyLength) return;
    this.#received = Buffer.alloc(0);
    this.#settle?.resolve({ status: Number(head.slice(9, 12)), head, body });
  }

  /** Sends a request, or a part of it, and disconnects before the reply: orderly, or with a reset. */
  leave(request: Buffer, how: "end" | "reset"): Promise<void> {
    return new Promise((resolve) => {
      this.socket.on("close", () => resolve());
      this.socket.write(request, () => how === "end" ? this.socket.destroy() : this.socket.resetAndDestroy());
    });
  }

  close() {
    this.socket.destroy();
  }
}

/** Waits for a condition, and fails after ten seconds. */
export async function until(isSo: () => boolean | Promise<boolean>, what: string) {
  const giveUp = Date.now() + 10_000;
  while (!await isSo()) {
    if (Date.now() > giveUp) throw new Error(`Waited in vain: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** The headers that an MCP client sends with every message. */
export const clientHeaders = (token: string) => ({
  authorization: `Bearer ${token}`,
  accept: "application/json, text/event-stream",
  "content-type": "application/json",
});

export const message = (method: string, params: unknown = {}) =>
  JSON.stringify({ jsonrpc: "2.0", id: 1, method, params });

/** Sends a message as an MCP client does. `headers` adds to the usual ones, or replaces them. */
export function post(
  url: string,
  token: string,
  method: string,
  params: unknown = {},
  { headers, signal }: { headers?: Record<string, string>; signal?: AbortSignal } = {},
): Promise<Response> {
  return fetch(url, {
    method: "POST",
    headers: { ...clientHeaders(token), ...headers },
    body: message(method, params),
    ...(signal && { signal }),
  });
}

/** The same request as text, for a `Connection`. The header lines in `extra` replace the correct Content-Length. */
export function rawPost(
  token: string,
  body: string,
  { target = "/mcp", extra = [`content-length: ${Buffer.byteLength(body)}`] } = {},
): string {
  const headers = Object.entries(clientHeaders(token)).map((pair) => pair.join(": "));
  return [`POST ${target} HTTP/1.1`, "host: localhost", ...headers, ...extra, "", body].join("\r\n");
}
