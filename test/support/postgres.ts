/**
 * Starts a real PostgreSQL, and PgBouncer in front of it, on free ports of loopback, with all files in a temporary
 * directory.
 *
 * NOT FOR PRODUCTION: it does not wait for the disk, so it survives being killed, but not a power cut.
 */
import { execFile, spawn } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { chown, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import pg from "pg";
import { freePort } from "./server.ts";

/** Debian's packages leave these programs out of PATH. */
const directories = ["/usr/lib/postgresql/15/bin", "/usr/sbin", ...(process.env.PATH ?? "").split(delimiter)];

function find(name: string): string | undefined {
  return directories.map((directory) => join(directory, name)).find((path) => existsSync(path));
}

/** For a test's skip: which of these programs is missing, or false. With REQUIRE_POSTGRES=1 the test fails instead. */
function missing(...names: string[]): string | false {
  const name = names.find((name) => find(name) === undefined);
  return name !== undefined && process.env.REQUIRE_POSTGRES !== "1" && `no ${name} in ${directories.join(delimiter)}`;
}

export const noPostgres = missing("initdb", "postgres");
export const noPgBouncer = missing("initdb", "postgres", "pgbouncer");

/** Both refuse to be run by root. */
const NOBODY = { uid: 65_534, gid: 65_534 };
const user = process.getuid?.() === 0 ? NOBODY : {};

async function newDirectory(): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), "postgres-"));
  if (user === NOBODY) await chown(directory, NOBODY.uid, NOBODY.gid);
  return directory;
}

/**
 * Runs a program until it is ended, or until this process has ended, however that happens.
 *
 * @param ready What it prints when it accepts connections.
 * @param signal Ends it at once.
 * @returns Ends it.
 */
async function startProgram(name: string, args: string[], cwd: string, ready: string, signal: "QUIT" | "TERM") {
  // The shell's input ends with this process.
  const script = `"$@" & read -r _; kill -${signal} $!; wait`;
  const command = ["-c", script, "sh", find(name) ?? name, ...args];
  const program = spawn("sh", command, { cwd, ...user, stdio: ["pipe", "ignore", "pipe"] });
  const ended = once(program, "close");
  const lines: string[] = [];
  const output = createInterface(program.stderr);
  await new Promise((resolve, reject) => {
    output.on("line", (line) => {
      lines.push(line);
      if (line.includes(ready)) resolve(line);
    });
    output.on("close", () => reject(new Error(lines.join("\n"))));
  });
  return async () => {
    program.stdin.end();
    await ended;
  };
}

export interface Postgres {
  /** For DATABASE_URL. */
  url: string;
  /** Makes an empty database beside it: its DATABASE_URL. */
  newDatabase(): Promise<string>;
  /** Runs a statement there. All share one connection, since opening one takes longer than most statements. */
  query(statement: string): Promise<Record<string, unknown>[]>;
  /** Resolves when it accepts connections. */
  start(): Promise<void>;
  /** Ends it as a crash would: what is not committed is lost. */
  kill(): Promise<void>;
  /** Stops it if it runs, and removes its files. */
  close(): Promise<void>;
}

/** It accepts connections without TLS, and with TLS for a certificate that nobody trusts. */
export async function startPostgres(): Promise<Postgres> {
  const directory = await newDirectory();
  const data = join(directory, "data");
  const [port, password] = [await freePort(), randomUUID()];
  await writeFile(join(directory, "password"), password);
  await promisify(execFile)(find("initdb") ?? "initdb", [
    ...["--pgdata", data, "--username", "tasks", "--pwfile", join(directory, "password")],
    ...["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"],
  ], { cwd: directory, ...user });
  await promisify(execFile)("openssl", [
    ...["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"],
    ...["-subj", "/CN=localhost", "-keyout", join(data, "server.key"), "-out", join(data, "server.crt")],
  ], { cwd: directory, ...user });

  const settings = { port, listen_addresses: "127.0.0.1", unix_socket_directories: "", ssl: "on", fsync: "off" };
  const flags = Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]);
  let kill = () => Promise.resolve();

  async function start() {
    kill = await startProgram("postgres", ["-D", data, ...flags], directory, "ready to accept connections", "QUIT");
  }

  await start();
  const url = `postgres://tasks:${password}@127.0.0.1:${port}/postgres`;
  const pool = new pg.Pool({ connectionString: url, max: 1 });
  pool.on("error", () => {}); // it was killed
  const query = async (statement: string) => (await pool.query(statement)).rows;
  let databases = 0;
  return {
    url,
    async newDatabase() {
      const name = `database_${++databases}`;
      await query(`CREATE DATABASE ${name}`);
      return new URL(`/${name}`, url).href;
    },
    query,
    start,
    kill: () => kill(),
    async close() {
      await pool.end();
      await kill();
      await rm(directory, { recursive: true });
    },
  };
}

/**
 * Starts a pooler such as providers run: a connection to the database serves a client for one transaction.
 * In its default configuration it rejects session parameters that it would have to keep.
 *
 * @param url What `startPostgres` gives for a database.
 * @param port That of an earlier pooler, to take its place.
 * @returns The same URL, through the pooler.
 */
export async function startPgBouncer(url: string, port?: number): Promise<{ url: string; close(): Promise<void> }> {
  const directory = await newDirectory();
  const database = new URL(url);
  const pooled = new URL(url);
  pooled.port = String(port ?? await freePort());
  const configuration = `[databases]
    * = host=${database.hostname} port=${database.port}
    [pgbouncer]
    listen_addr = ${database.hostname}
    listen_port = ${pooled.port}
    unix_socket_dir =
    auth_type = scram-sha-256
    auth_file = ${join(directory, "users")}
    pool_mode = transaction
    default_pool_size = 4`; // fewer than callers, so that they share
  await writeFile(join(directory, "users"), `"${database.username}" "${database.password}"\n`);
  await writeFile(join(directory, "pgbouncer.ini"), configuration.replaceAll(/^ +/gm, ""));
  const kill = await startProgram("pgbouncer", [join(directory, "pgbouncer.ini")], directory, "process up", "TERM");
  return {
    url: pooled.href,
    async close() {
      await kill();
      await rm(directory, { recursive: true });
    },
  };
}

/** Runs a statement in a database, over a connection of its own. */
export async function queryOnce(url: string, statement: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client(url);
  await client.connect();
  try {
    return (await client.query(statement)).rows;
  } finally {
    await client.end();
  }
}
