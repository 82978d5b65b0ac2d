/** What `npm test` loads first into each of its processes. */
import { tmpdir } from "node:os";
import { join } from "node:path";

// Node 22.18 and later read TypeScript by themselves, in half the time that tsx takes to start.
if (!process.features.typescript) await import("tsx");

// V8's compile cache, for all child processes: a server starts in 0.6 CPU-seconds in place of 0.8. Node 20 ignores it.
process.env.NODE_COMPILE_CACHE ??= join(tmpdir(), "node-compile-cache");
