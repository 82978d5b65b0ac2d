/** Starts the real server on loopback: inside the test's process, or as a process of its own. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import type { Server } from "node:http";
import { isBuiltin } from "node:module";
import { connect, createServer as createNetServer } from "node:net";
import type { AddressInfo, Socket } from "node:net";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable } from "node:stream";
import { text } from "node:stream/consumers";
import type { TestContext } from "node:test";
import { createServer, readSettings } from "../../server.ts";
import { openTaskStore } from "../../tools.ts";
import type { TaskStore } from "../../tools.ts";

/** What makes this runtime read TypeScript, for processes started by a test: nothing where Node does so by itself. */
const RUNTIME_FLAGS = "Deno" in globalThis
  ? ["run", "-A"]
  : process.features.typescript
  ? []
  : ["--import", import.meta.resolve("tsx")];

/** Why a test of SQLite is skipped, or false where it runs. */
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
  store: TaskStore;
  http: Server;
  close(): Promise<void>;
}

/**
 * @param env Overrides what a test needs: AUTH0_DOMAIN at least. Tasks are kept in memory unless it says otherwise.
 * @param store Where a test brings its own; it is closed with the server all the same.
 * @param create Where a test brings a changed server.
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

/** Nothing of the test's own but where programs lie, and where V8 keeps what it has compiled. */
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
  const root = join(import.meta.dirname, "../..");
  const { scripts } = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
  const command = [...RUNTIME_FLAGS, join(root, scripts[name].replace("tsx ", "")), ...args];
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
  /** Where its log arrives, for a test that stops reading it. */
  stderr: Readable;
  /** What it has written to stderr so far. */
  lines: string[];
  /** Resolves when it says that it listens, or has ended. */
  ready: Promise<unknown>;
  /** Resolves with the exit status, or the signal that ended it, when all its output is there. */
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

/** A connection of one's own, for what no client library sends. Being cut off is no error of it. */
export async function open(port: number): Promise<Socket> {
  const socket = connect(port, "127.0.0.1");
  socket.on("error", () => {});
  await once(socket, "connect");
  return socket;
}

/** Waits for what a server does on its own, and fails if it never does. */
export async function until(isSo: () => boolean | Promise<boolean>, what: string) {
  const giveUp = Date.now() + 10_000;
  while (!await isSo()) {
    if (Date.now() > giveUp) throw new Error(`Waited in vain: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** What a client of MCP sends with every message. */
export const clientHeaders = (token: string) => ({
  authorization: `Bearer ${token}`,
  accept: "application/json, text/event-stream",
  "content-type": "application/json",
});

/** Sends a message as a client of MCP does, with further headers or other ones. */
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
    body: JSON.stringify({ jsonrpc: "2.0", id: 1, method, params }),
    ...(signal && { signal }),
  });
}
