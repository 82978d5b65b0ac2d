/** The real server with three bugs: two that a signal triggers, and one while CLOSE_HANGS is set. */
import { fileURLToPath } from "node:url";

const server = new URL("../../server.ts", import.meta.url);

process.on("SIGHUP", () => void Promise.reject(new Error("Nobody awaited this")));
// Not in the listener itself, whose exceptions are rejections on Deno.
process.on("SIGUSR2", () =>
  setImmediate(() => {
    throw new Error("Nobody caught this");
  }));
if (process.env.CLOSE_HANGS) {
  const { DatabaseSync } = await import("node:sqlite");
  Object.assign(DatabaseSync.prototype, { close: () => new Promise(() => {}) });
  setInterval(() => {}, 1_000); // keeps the process running, as an open database connection does
  const { setTimeout } = globalThis;
  // Timers run a thousand times faster, so that a test need not wait for the time-out of a stop.
  Object.assign(globalThis, { setTimeout: (work: () => void, delay: number) => setTimeout(work, delay / 1_000) });
}
process.argv[1] = fileURLToPath(server); // server.ts starts only where it is the main program
await import(server.href);
