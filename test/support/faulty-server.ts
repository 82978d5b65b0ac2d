/** The real server, with two mistakes in it that happen when a signal asks for them. */
import { fileURLToPath } from "node:url";

const server = new URL("../../server.ts", import.meta.url);

process.on("SIGHUP", () => void Promise.reject(new Error("Nobody awaited this")));
// Not in the listener itself, whose exceptions are rejections on Deno.
process.on("SIGUSR2", () =>
  setImmediate(() => {
    throw new Error("Nobody caught this");
  }));
process.argv[1] = fileURLToPath(server); // it starts only where it is the program that was called
await import(server.href);
