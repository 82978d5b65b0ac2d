/**
 * Starts a real PostgreSQL of the test's own: on a free port of loopback, with all its files in a temporary directory.
 *
 * NOT FOR PRODUCTION: it does not wait for the disk, so it survives being killed, but not a power cut.
 */
import { execFileSync, spawn } from "node:child_process";
import type { ChildProcessByStdio } from "node:child_process";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { chown, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import pg from "pg";
import { freePort } from "./server.ts";

/** Debian's package leaves the server's programs out of PATH. */
const directories = ["/usr/lib/postgresql/15/bin", ...(process.env.PATH ?? "").split(delimiter)];
const programs = directories.find((directory) =>
  ["initdb", "postgres"].every((name) => existsSync(join(directory, name)))
);

/** For a test's `skip`: why there is no PostgreSQL, or false. With REQUIRE_POSTGRES=1 the test fails instead. */
export const noPostgres = programs === undefined && process.env.REQUIRE_POSTGRES !== "1"
  ? `no initdb and postgres in ${directories.join(delimiter)}`
  : false;

/** PostgreSQL refuses to be run by root. */
const NOBODY = { uid: 65_534, gid: 65_534 };

export interface Postgres {
  /** For DATABASE_URL. */
  url: string;
  /** Makes an empty database beside it: its DATABASE_URL. */
  newDatabase(): Promise<string>;
  /** Resolves when it takes connections. */
  start(): Promise<void>;
  /** Ends it as a crash would: what is not committed is lost. */
  kill(): Promise<void>;
  /** Ends it while it runs, and removes all its files. */
  close(): Promise<void>;
}

/** It takes connections with TLS, for a certificate that nobody trusts, and without. */
export async function startPostgres(): Promise<Postgres> {
  if (programs === undefined) throw new Error(`No initdb and postgres in ${directories.join(delimiter)}`);
  const directory = await mkdtemp(join(tmpdir(), "postgres-"));
  const [port, password] = [await freePort(), randomUUID()];
  const passwordFile = join(directory, "password");
  await writeFile(passwordFile, password, { mode: 0o600 });
  const user = process.getuid?.() === 0 ? NOBODY : {};
  if (user === NOBODY) {
    for (const path of [directory, passwordFile]) await chown(path, NOBODY.uid, NOBODY.gid);
  }
  const options = { cwd: directory, ...user };

  const data = join(directory, "data");
  execFileSync(join(programs, "initdb"), [
    ...["--pgdata", data, "--username", "tasks", "--pwfile", passwordFile, "--auth", "scram-sha-256"],
    ...["--encoding", "UTF8", "--locale", "C", "--no-sync"],
  ], { ...options, stdio: "pipe" });
  execFileSync("openssl", [
    ...[
      "req",
      "-x509",
      "-newkey",
      "ec",
      "-pkeyopt",
      "ec_paramgen_curve:P-256",
      "-nodes",
      "-subj",
      "/CN=localhost",
    ],
    ...["-keyout", join(data, "server.key"), "-out", join(data, "server.crt")],
  ], { ...options, stdio: "pipe" });

  const settings = {
    port,
    listen_addresses: "127.0.0.1",
    unix_socket_directories: "",
    ssl: "on",
    fsync: "off",
  };
  const flags = Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]);
  let server: ChildProcessByStdio<Writable, null, Readable>;

  async function start() {
    // The shell ends it when its input ends, so it outlives no test, however that one ends.
    const script = '"$@" & read -r _; kill -QUIT $!; wait';
    server = spawn("sh", ["-c", script, "sh", join(programs ?? "", "postgres"), "-D", data, ...flags], {
      ...options,
      stdio: ["pipe", "ignore", "pipe"],
    });
    const lines: string[] = [];
    const output = createInterface(server.stderr);
    await new Promise((resolve, reject) => {
      output.on("line", (line) => {
        lines.push(line);
        if (line.includes("ready to accept connections")) resolve(line);
      });
      output.on("close", () => reject(new Error(lines.join("\n"))));
    });
  }

  async function kill() {
    const ended = once(server, "close");
    server.stdin.end();
    await ended;
  }

  await start();
  const url = `postgres://tasks:${password}@127.0.0.1:${port}/postgres`;
  let databases = 0;
  return {
    url,
    async newDatabase() {
      const name = `database_${++databases}`;
      await query(url, `CREATE DATABASE ${name}`);
      return new URL(`/${name}`, url).href;
    },
    start,
    kill,
    async close() {
      await kill();
      await rm(directory, { recursive: true });
    },
  };
}

/** Runs a statement beside the store, over a connection of its own. */
export async function query(url: string, statement: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client(url);
  await client.connect();
  try {
    return (await client.query(statement)).rows;
  } finally {
    await client.end();
  }
}
