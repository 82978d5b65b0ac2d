/**
 * `npm run bench`: what a call costs, beside a bare node:http and beside the SDK's documented pattern.
 *
 * Each server is a process of its own. They take the same load in turns, round by round, so that a noisy machine
 * is noisy for all of them: compare the figures of one run, never of two. CPU is what the server's process uses,
 * user and system, and is the steadiest of them. Every reply is compared, byte by byte, with what it must be.
 *
 * `npm run bench -- --memory` sends a million calls instead, and shows what the server's memory does. `--quick` shows
 * in a few seconds that all replies are right; its figures mean nothing.
 */
import assert from "node:assert/strict";
import { appendFile, copyFile, mkdtemp, rm, symlink } from "node:fs/promises";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { Connection, median, megabytes, runtime, toRequest, usageOf } from "./load.ts";
import type { Reply } from "./load.ts";
import { noPostgres, startPostgres } from "../../support/postgres.ts";
import { freePort, noSqlite, spawnServer } from "../../support/server.ts";
import type { ServerProcess } from "../../support/server.ts";
import { startTenant } from "../../support/tenant.ts";

const isQuick = process.argv.includes("--quick");
const isForMemory = process.argv.includes("--memory");

const CONNECTIONS = 16;
const USERS = isQuick ? 2 : 16; // their tokens take turns on every connection
const TASKS = 10; // of each
const ROUNDS = isQuick ? 2 : 9; // the first warms up and does not count
const ROUND_MS = isQuick ? 20 : 700;
const STARTS = isQuick ? 1 : 3;
const MORE_TOOLS = 95;
const MORE_TASKS = isQuick ? 100 : 100_000;

const SCENARIOS = ["tools/call", "tools/list", "refused token"] as const;
type Scenario = typeof SCENARIOS[number];

/** What is started, and under which name. */
interface Program {
  name: string;
  script: string;
  env?: Record<string, string>;
}

interface Running {
  server: ServerProcess;
  port: number;
  /** Milliseconds from start to first answer. */
  startTime: number;
}

/** A server that takes part: what it is asked, and what it has to answer. */
interface Contestant extends Program, Running {
  exchanges: Record<Scenario, { request: Buffer; expected: Reply }[]>;
}

/** What a contestant did in one round. */
interface Round {
  calls: number;
  perSecond: number;
  /** Milliseconds. */
  p50: number;
  p99: number;
  /** Microseconds a call. */
  cpu: number;
}

const root = join(import.meta.dirname, "../../..");
const audience = "http://localhost/mcp"; // the same for all, whatever their ports
const directory = await mkdtemp(join(tmpdir(), "bench-"));
const postgres = noPostgres || isForMemory ? undefined : await startPostgres();
const tenant = await startTenant();
const tokens = await signTokens();
const expired = await signTokens({ exp: 1_000_000_000 });
const requests: Record<Scenario, Buffer[]> = {
  // The query tells the bare server which reply is wanted. The others do not read it.
  "tools/call": tokens.map((token) => toRequest(token, "tools/call", { name: "list_tasks" }, "/mcp?tools/call")),
  "tools/list": tokens.map((token) => toRequest(token, "tools/list", {}, "/mcp?tools/list")),
  "refused token": expired.map((token) => toRequest(token, "tools/list", {}, "/mcp?refused")),
};
const servers: ServerProcess[] = [];
let calls = 0;
let wrong = 0;

try {
  const store = noSqlite ? `memory, since ${noSqlite}` : "SQLite";
  console.log(`${runtime} on ${process.platform}, ${availableParallelism()} CPUs, tasks in ${store}`);
  await (isForMemory ? watchMemory() : compare());
  console.log(`\nWrong replies: ${wrong} of ${calls.toLocaleString("en")}`);
  process.exitCode = wrong === 0 ? 0 : 1;
} finally {
  await Promise.all(servers.map(end));
  await tenant.close();
  await postgres?.close();
  await rm(directory, { recursive: true });
}

async function compare() {
  const script = join(root, "server.ts");
  const ours = await enter({ name: "server.ts", script });
  const grown = await enter({ name: "server.ts, grown", script: await copyWithMoreTools() });
  if (!noSqlite) await addTasksOfOthers(grown);
  const pooled = postgres &&
    await enter({ name: "server.ts, PostgreSQL", script, env: { DATABASE_URL: postgres.url } });
  const documented = await enter({
    name: "documented pattern",
    script: join(root, "test/run/bench/peer-documented.ts"),
  });
  const bare = await enterBare(ours);

  // All take part in all, so that all are equally warm.
  const contestants = [bare, ours, grown, pooled ?? [], documented].flat();
  const lanes = SCENARIOS.flatMap((scenario) =>
    contestants.map((contestant) => ({ scenario, contestant, rounds: [] as Round[] }))
  );
  for (let number = 0; number < ROUNDS; number++) {
    for (const { scenario, contestant, rounds } of number % 2 === 0 ? lanes : lanes.toReversed()) {
      const round = await run(contestant, scenario);
      if (number > 0) rounds.push(round);
    }
  }

  for (const scenario of SCENARIOS) {
    const rows = lanes.filter((lane) => lane.scenario === scenario)
      .map(({ contestant: { name }, rounds }) => ({ name, ...medianOf(rounds) }));
    const [least = NaN, most = NaN] = [rows.at(0)?.cpu, rows.at(-1)?.cpu];
    print(`\n${scenario}`, "requests/s", "p50 ms", "p99 ms", "CPU µs", "x bare", "x documented");
    for (const { name, perSecond, p50, p99, cpu } of rows) {
      const figures = [perSecond.toFixed(), p50.toFixed(2), p99.toFixed(2), cpu.toFixed()];
      print(`  ${name}`, ...figures, (cpu / least).toFixed(2), (cpu / most).toFixed(2));
    }
  }
  const others = noSqlite ? "" : ` and ${MORE_TASKS.toLocaleString("en")} tasks of others`;
  console.log(`\n"x" is CPU beside that of the others. "grown" has ${MORE_TOOLS} more tools to list${others}`);

  print("\nprocess", "start ms", "memory");
  for (const contestant of [bare, ours, documented]) {
    const times = [contestant.startTime];
    while (times.length < STARTS) {
      const { server, startTime } = await start(contestant);
      times.push(startTime);
      await end(server);
    }
    print(`  ${contestant.name}`, median(times).toFixed(), megabytes(usageOf(contestant.server.pid).rss));
  }
}

/** Sends a million calls and prints the server's memory on the way. */
async function watchMemory() {
  const ours = await enter({ name: "server.ts", script: join(root, "server.ts") });
  const marks = [10_000, 100_000, 250_000, 500_000, 750_000, 1_000_000];
  for (let served = 0; marks.length > 0;) {
    served += (await run(ours, "tools/call")).calls;
    if (served < (marks[0] ?? 0)) continue;
    console.log(
      `${served.toLocaleString("en").padStart(9)} calls: ${megabytes(usageOf(ours.server.pid).rss)}`,
    );
    marks.shift();
  }
}

/** A token for each user. */
function signTokens(claims: Record<string, unknown> = {}): Promise<string[]> {
  const subjects = Array.from({ length: USERS }, (_, user) => `auth0|user-${user}`);
  return Promise.all(subjects.map((sub) => tenant.sign({ sub, aud: audience, ...claims })));
}

/** Starts a server, gives each user their tasks, and notes the answer to each request. */
async function enter(program: Program): Promise<Contestant> {
  const running = await start(program);
  const connection = new Connection(running.port);
  for (const [user, token] of tokens.entries()) {
    for (const title of titlesOf(user)) {
      await connection.send(toRequest(token, "tools/call", { name: "create_task", arguments: { title } }));
    }
  }
  connection.close();
  const exchanges = await ask(running.port);
  for (const [user, { expected }] of exchanges["tools/call"].entries()) {
    const { structuredContent, content: [text] } = JSON.parse(String(expected.body)).result;
    const titles = structuredContent.tasks.map(({ title }: { title: string }) => title);
    assert.deepEqual(titles, titlesOf(user).toReversed());
    assert.deepEqual(JSON.parse(text.text), structuredContent);
  }
  for (const { expected } of exchanges["refused token"]) assert.equal(expected.status, 401);
  return { ...program, ...running, exchanges };
}

function titlesOf(user: number): string[] {
  return Array.from({ length: TASKS }, (_, number) => `Task ${number} of user ${user}`);
}

/** The bare server replies with the very JSON of another one, of its first user. */
async function enterBare({ exchanges }: Contestant): Promise<Contestant> {
  const [called, listed, refused] = SCENARIOS.map((scenario) => String(exchanges[scenario][0]?.expected.body));
  const replies = `{"/mcp?tools/call":${called},"/mcp?tools/list":${listed},"/mcp?refused":${refused}}`;
  const script = join(root, "test/run/bench/peer-bare.ts");
  const program = { name: "bare node:http", script, env: { REPLIES: replies } };
  const running = await start(program);
  return { ...program, ...running, exchanges: await ask(running.port) };
}

/** Sends each request once. */
async function ask(port: number): Promise<Contestant["exchanges"]> {
  const exchanges: Contestant["exchanges"] = { "tools/call": [], "tools/list": [], "refused token": [] };
  const connection = new Connection(port);
  for (const scenario of SCENARIOS) {
    for (const request of requests[scenario]) {
      exchanges[scenario].push({ request, expected: await connection.send(request) });
    }
  }
  connection.close();
  return exchanges;
}

/** Starts a server with a database of its own, and waits for its first answer. */
async function start({ script, env }: Program): Promise<Running> {
  const port = await freePort();
  const started = performance.now();
  const server = spawnServer(
    {
      AUTH0_DOMAIN: tenant.origin,
      MCP_SERVER_URL: audience,
      PORT: String(port),
      DATABASE_URL: noSqlite ? "memory:" : `file:${databaseOf(port)}`,
      ...env,
    },
    directory,
    script,
  );
  servers.push(server);
  await server.ready;
  const connection = new Connection(port);
  const [request = Buffer.alloc(0)] = requests["tools/list"];
  assert.equal((await connection.send(request)).status, 200, server.lines.join("\n"));
  connection.close();
  return { server, port, startTime: performance.now() - started };
}

async function end({ kill, exited }: ServerProcess) {
  kill("SIGTERM");
  await exited;
}

function databaseOf(port: number): string {
  return join(directory, `${port}.db`);
}

/** One round of load: each connection sends its next request when it has the answer to the one before. */
async function run({ server, port, exchanges }: Contestant, scenario: Scenario): Promise<Round> {
  const turns = inTurn(exchanges[scenario]);
  const times: number[] = [];
  const before = usageOf(server.pid);
  const started = performance.now();
  await Promise.all(Array.from({ length: CONNECTIONS }, async () => {
    const connection = new Connection(port);
    while (performance.now() - started < ROUND_MS) {
      const { request, expected } = turns.next().value;
      const sent = performance.now();
      const { status, body } = await connection.send(request);
      times.push(performance.now() - sent);
      if (status !== expected.status || !body.equals(expected.body)) wrong++;
    }
    connection.close();
  }));
  const seconds = (performance.now() - started) / 1_000;
  const cpu = usageOf(server.pid).cpu - before.cpu;
  times.sort((a, b) => a - b);
  const percentile = (share: number) => times[Math.floor(times.length * share)] ?? NaN;
  calls += times.length;
  return {
    calls: times.length,
    perSecond: times.length / seconds,
    p50: percentile(0.5),
    p99: percentile(0.99),
    cpu: cpu / times.length,
  };
}

function* inTurn<T>(items: T[]): Generator<T, never> {
  for (;;) yield* items;
}

/** Copies server.ts and adds tools to it: what a call costs must not depend on their number. */
async function copyWithMoreTools(): Promise<string> {
  for (const file of ["server.ts", "auth.ts", "tools.ts", "package.json"]) {
    await copyFile(join(root, file), join(directory, file));
  }
  await symlink(join(root, "node_modules"), join(directory, "node_modules"), "junction");
  const another = '{ ...tools[0], listed: { ...tools[0].listed, name: "tool_" + number } }';
  const more = `for (let number = 0; number < ${MORE_TOOLS}; number++) tools.push(${another});`;
  await appendFile(join(directory, "tools.ts"), more);
  return join(directory, "server.ts");
}

/** In one statement and past the server, which would make each task durable by itself. */
async function addTasksOfOthers({ port }: Contestant) {
  const { DatabaseSync } = await import("node:sqlite");
  const database = new DatabaseSync(databaseOf(port));
  database.exec(
    `WITH RECURSIVE numbers (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM numbers WHERE n < ${MORE_TASKS})
     INSERT INTO tasks (id, owner, title, status, created_at, updated_at)
     SELECT 'id-' || n, 'auth0|other-' || (n / 1000), 'Task ' || n, 'todo', time, time
     FROM numbers, (SELECT '2026-01-01T00:00:00.000Z' AS time)`,
  );
  database.close();
}

function medianOf(rounds: Round[]): Round {
  const of = (key: keyof Round) => median(rounds.map((round) => round[key]));
  return { calls: of("calls"), perSecond: of("perSecond"), p50: of("p50"), p99: of("p99"), cpu: of("cpu") };
}

function print(name: string, ...cells: string[]) {
  console.log(name.padEnd(24) + cells.map((cell) => cell.padStart(13)).join(""));
}
