/**
 * `npm run bench`: what a call costs, beside a bare node:http and beside the SDK's documented pattern.
 *
 * Each server is a process of its own. They get the same load in turns, and each figure is the best of several rounds,
 * since other load on the machine only adds: compare figures of one run only. CPU is user and system time of the
 * server's process. Every reply is compared with the expected bytes. `--quick` only shows in a few seconds that all
 * replies are right.
 */
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { runtime, toRequest, usageOf } from "./load.ts";
import { Connection, freePort, noSqlite, type Reply, type ServerProcess, spawnServer } from "../../support/server.ts";
import { startTenant } from "../../support/tenant.ts";

const isQuick = process.argv.includes("--quick");
const CONNECTIONS = 16;
const USERS = isQuick ? 2 : 16; // their tokens take turns on every connection
const TITLES = Array.from({ length: 10 }, (_, number) => `Task ${number}`); // of each user's tasks
const ROUNDS = isQuick ? 2 : 11; // the first warms up and does not count
const ROUND_MS = isQuick ? 20 : 700;

interface Running {
  server: ServerProcess;
  port: number;
}

/** A server under one kind of call, with its requests and the expected replies. */
interface Contestant extends Running {
  name: string;
  exchanges: { request: Buffer; expected: Reply }[];
  rounds: Round[];
}

interface Round {
  /** Microseconds a call. */
  cpu: number;
  perSecond: number;
  /** Milliseconds. */
  p50: number;
  p99: number;
}

const audience = "http://localhost/mcp"; // the same for all servers
const directory = await mkdtemp(join(tmpdir(), "bench-"));
const tenant = await startTenant();
const servers: ServerProcess[] = [];
const rows: { call: string; contestants: Contestant[] }[] = [];
let calls = 0;
let wrong = 0;

try {
  console.log(`${runtime} on ${process.platform}, ${availableParallelism()} CPUs`);
  const [tokens, expired] = [await signTokens(), await signTokens({ exp: 1_000_000_000 })];
  const listTasks = tokens.map((token) => toRequest(token, "tools/call", { name: "list_tasks" }));
  const inMemory = await startPair(tokens, () => "memory:");
  await addRow("tools/call, ten tasks in memory", inMemory, listTasks, assertListsAll);
  if (!noSqlite) {
    const onSqlite = await startPair(tokens, () => `file:${servers.length}.db`);
    await addRow("tools/call, ten tasks from SQLite", onSqlite, listTasks, assertListsAll);
  }
  const [listTools, refused] = [tokens, expired].map((some) => some.map((token) => toRequest(token, "tools/list")));
  await addRow("tools/list", inMemory, listTools ?? [], ({ status }) => assert.equal(status, 200));
  await addRow("a refused token (expired)", inMemory, refused ?? [], ({ status }) => assert.equal(status, 401));

  const contestants = rows.flatMap((row) => row.contestants);
  for (let number = 0; number < ROUNDS; number++) {
    for (const contestant of number % 2 === 0 ? contestants : contestants.toReversed()) {
      const round = await runRound(contestant);
      if (number > 0) contestant.rounds.push(round);
    }
  }
  for (const { call, contestants } of rows) report(call, contestants);
  console.log(`\n"x" is CPU beside that of the others. Wrong replies: ${wrong} of ${calls.toLocaleString("en")}`);
  process.exitCode = wrong === 0 ? 0 : 1;
} finally {
  for (const { kill, exited } of servers) {
    kill("SIGTERM");
    await exited;
  }
  await tenant.close();
  await rm(directory, { recursive: true });
}

/** A token for each user. */
function signTokens(claims: Record<string, unknown> = {}): Promise<string[]> {
  const subjects = Array.from({ length: USERS }, (_, user) => `auth0|user-${user}`);
  return Promise.all(subjects.map((sub) => tenant.sign({ sub, aud: audience, ...claims })));
}

async function start(path: string, env: Record<string, string>): Promise<Running> {
  const port = await freePort();
  const settings = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: audience, PORT: String(port), ...env };
  const server = spawnServer(settings, directory, join(import.meta.dirname, path));
  servers.push(server);
  await server.ready;
  return { server, port };
}

interface Pair {
  ours: Running;
  documented: Running;
}

/** Starts both, each with a database of its own that holds every user's tasks. */
async function startPair(tokens: string[], newUrl: () => string): Promise<Pair> {
  const ours = await start("../../../server.ts", { DATABASE_URL: newUrl() });
  const documented = await start("peer-documented.ts", { DATABASE_URL: newUrl() });
  const requests = tokens.flatMap((token) =>
    TITLES.map((title) => toRequest(token, "tools/call", { name: "create_task", arguments: { title } }))
  );
  for (const running of [ours, documented]) await enter("", running, requests);
  return { ours, documented };
}

/** Sends each request once, to record its reply. */
async function enter(name: string, { server, port }: Running, requests: Buffer[]): Promise<Contestant> {
  const contestant: Contestant = { name, server, port, exchanges: [], rounds: [] };
  const connection = new Connection(port);
  for (const request of requests) contestant.exchanges.push({ request, expected: await connection.send(request) });
  connection.close();
  return contestant;
}

async function addRow(call: string, pair: Pair, requests: Buffer[], check: (reply: Reply) => void) {
  const ours = await enter("server.ts", pair.ours, requests);
  const documented = await enter("documented pattern", pair.documented, requests);
  for (const { expected } of [...ours.exchanges, ...documented.exchanges]) check(expected);
  // The bare server replies with the JSON that server.ts gives its first user.
  const running = await start("peer-bare.ts", { REPLY: String(ours.exchanges[0]?.expected.body) });
  rows.push({ call, contestants: [await enter("bare node:http", running, requests), ours, documented] });
}

function assertListsAll({ body }: Reply) {
  const { structuredContent, content: [text] } = JSON.parse(String(body)).result;
  assert.deepEqual(structuredContent.tasks.map(({ title }: { title: string }) => title).sort(), TITLES);
  assert.deepEqual(JSON.parse(text.text), structuredContent);
}

/** One round of load: each connection sends its next request when it has the answer to the one before. */
async function runRound({ server, port, exchanges }: Contestant): Promise<Round> {
  const times: number[] = [];
  let turn = 0;
  const before = usageOf(server.pid);
  const started = performance.now();
  await Promise.all(Array.from({ length: CONNECTIONS }, async () => {
    const connection = new Connection(port);
    while (performance.now() - started < ROUND_MS) {
      const exchange = exchanges[turn++ % exchanges.length];
      assert.ok(exchange !== undefined);
      const sent = performance.now();
      const { status, body } = await connection.send(exchange.request);
      times.push(performance.now() - sent);
      if (status !== exchange.expected.status || !body.equals(exchange.expected.body)) wrong++;
    }
    connection.close();
  }));
  const seconds = (performance.now() - started) / 1_000;
  const cpu = (usageOf(server.pid).cpu - before.cpu) / times.length;
  times.sort((a, b) => a - b);
  const percentile = (share: number) => times[Math.floor(times.length * share)] ?? NaN;
  calls += times.length;
  return { cpu, perSecond: times.length / seconds, p50: percentile(0.5), p99: percentile(0.99) };
}

function report(call: string, contestants: Contestant[]) {
  const print = (name: string, ...cells: string[]) =>
    console.log(name.padEnd(36) + cells.map((cell) => cell.padStart(13)).join(""));
  const least = (rounds: Round[], key: keyof Round) => Math.min(...rounds.map((round) => round[key]));
  const [bare = NaN, , documented = NaN] = contestants.map(({ rounds }) => least(rounds, "cpu"));
  print(`\n${call}`, "CPU µs", "x bare", "x documented", "requests/s", "p50 ms", "p99 ms");
  for (const { name, rounds } of contestants) {
    const cpu = least(rounds, "cpu");
    const perSecond = Math.max(...rounds.map((round) => round.perSecond)).toFixed();
    const times = [least(rounds, "p50").toFixed(2), least(rounds, "p99").toFixed(2)];
    print(`  ${name}`, cpu.toFixed(), (cpu / bare).toFixed(2), (cpu / documented).toFixed(2), perSecond, ...times);
  }
}
