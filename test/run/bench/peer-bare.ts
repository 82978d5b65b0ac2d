/** What node:http and JSON alone cost, for bench.ts: reads the body, parses it, and replies with the JSON in REPLY. */
import { createServer } from "node:http";

const { PORT, REPLY = "{}" } = process.env;
const reply: unknown = JSON.parse(REPLY);

createServer((request, response) => {
  const chunks: Buffer[] = [];
  request.on("data", (chunk: Buffer) => chunks.push(chunk));
  request.on("end", () => {
    JSON.parse(Buffer.concat(chunks).toString());
    const body = JSON.stringify(reply);
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) });
    response.end(body);
  });
}).listen(Number(PORT), "127.0.0.1", () => console.error("Listening on", PORT));
