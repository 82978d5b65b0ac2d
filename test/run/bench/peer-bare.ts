/**
 * What node:http and JSON alone cost, for bench.ts: reads the body, parses it, and replies with the JSON that REPLIES
 * has for the path.
 */
import { createServer } from "node:http";

const { PORT, REPLIES = "{}" } = process.env;
const replies: Record<string, unknown> = JSON.parse(REPLIES);

createServer((request, response) => {
  const chunks: Buffer[] = [];
  request.on("data", (chunk: Buffer) => chunks.push(chunk));
  request.on("end", () => {
    JSON.parse(Buffer.concat(chunks).toString());
    const body = JSON.stringify(replies[request.url ?? ""]);
    response.writeHead(200, {
      "Content-Type": "application/json",
      "Content-Length": Buffer.byteLength(body),
    });
    response.end(body);
  });
}).listen(Number(PORT), "127.0.0.1", () => console.error("Listening on", PORT));
