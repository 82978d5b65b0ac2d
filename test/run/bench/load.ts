/** What bench.ts and soak.ts share: a client that costs little, and what a process has used. */
import { readFileSync } from "node:fs";
import { connect } from "node:net";
import type { Socket } from "node:net";

export const runtime = "Deno" in globalThis ? `Deno ${process.versions.deno}` : `Node ${process.versions.node}`;

/** An MCP message as the bytes of an HTTP request, so that it can be made once and sent often. */
export function toRequest(token: string, method: string, params: Record<string, unknown> = {}, path = "/mcp"): Buffer {
  const body = JSON.stringify({ jsonrpc: "2.0", id: 1, method, params });
  const head = [
    `POST ${path} HTTP/1.1`,
    "Host: localhost",
    `Authorization: Bearer ${token}`,
    "Accept: application/json, text/event-stream",
    "Content-Type: application/json",
    `Content-Length: ${Buffer.byteLength(body)}`,
  ];
  return Buffer.from(`${head.join("\r\n")}\r\n\r\n${body}`);
}

export interface Reply {
  status: number;
  head: string;
  body: Buffer;
}

/**
 * A keep-alive connection that carries one request at a time.
 *
 * A raw socket, since node:http's client takes more CPU than the servers that are measured with it: it would be
 * the client that is measured. Reads replies with a Content-Length, and no others.
 */
export class Connection {
  readonly #socket: Socket;
  #received: Buffer = Buffer.alloc(0);
  #settle: { resolve: (reply: Reply) => void; reject: (error: Error) => void } | undefined;

  constructor(port: number) {
    this.#socket = connect(port, "127.0.0.1").setNoDelay();
    this.#socket.on("data", (chunk: Buffer) => {
      this.#received = this.#received.length === 0 ? chunk : Buffer.concat([this.#received, chunk]);
      this.#read();
    });
    this.#socket.on("error", () => {}); // "close" follows
    this.#socket.on("close", () => this.#settle?.reject(new Error("The server has closed the connection")));
  }

  send(request: Buffer): Promise<Reply> {
    return new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
      this.#socket.write(request);
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

  /** Sends what there is of a request and goes away without a reply: orderly, or with a reset. */
  leave(request: Buffer, how: "end" | "reset"): Promise<void> {
    return new Promise((resolve) => {
      this.#socket.on("close", () => resolve());
      this.#socket.write(request, () => how === "end" ? this.#socket.destroy() : this.#socket.resetAndDestroy());
    });
  }

  close() {
    this.#socket.destroy();
  }
}

/** Microseconds of CPU, and bytes of memory. */
export interface Usage {
  cpu: number;
  rss: number;
}

/**
 * What a process has used until now: CPU of all its threads, user and system, and resident memory.
 *
 * From /proc (proc_pid_stat(5)), so that the server needs no part in it; NaN where there is none.
 */
export function usageOf(pid: number | undefined): Usage {
  try {
    // Behind the name in parentheses, which may hold blanks: fields 14 and 15, in ticks of 10 ms.
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

export function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
}

export function megabytes(bytes: number): string {
  return Number.isNaN(bytes) ? "n/a" : `${Math.round(bytes / 1e6)} MB`;
}
