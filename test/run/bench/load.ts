/** What bench.ts and soak.ts share: prepared requests, and the CPU and memory of a process. */
import { readFileSync } from "node:fs";
import { message, rawPost } from "../../support/server.ts";

export const runtime = "Deno" in globalThis ? `Deno ${process.versions.deno}` : `Node ${process.versions.node}`;

/** An MCP message as the bytes of an HTTP request, so that it can be made once and sent often. */
export function toRequest(token: string, method: string, params: Record<string, unknown> = {}): Buffer {
  return Buffer.from(rawPost(token, message(method, params)));
}

/**
 * What a process has used until now: microseconds of CPU, user and system, and bytes of resident memory. Read from
 * /proc (proc_pid_stat(5)); NaN where there is none.
 */
export function usageOf(pid: number): { cpu: number; rss: number } {
  try {
    // Fields 14 and 15, in ticks of 10 ms, counted after the name in parentheses, which may hold blanks.
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1").replace(/^.*\) /s, "").split(" ");
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return {
      cpu: (Number(stat[11]) + Number(stat[12])) * 10_000,
      rss: Number(/^VmRSS:\s*(\d+) kB/m.exec(status)?.[1]) * 1024,
    };
  } catch {
    return { cpu: NaN, rss: NaN };
  }
}
