/** `npm run doctor` against servers, good and bad, and its command line. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import { assertMissing, runDoctor, sendPage, start, startBehindTunnel, statusOf } from "./support/doctor.ts";
import { freePort, runCommandLine } from "./support/server.ts";

test("a server that is down is what is missing, and nothing of it is claimed", async (t) => {
  const { env } = await start(t);
  const report = await runDoctor({ ...env, MCP_SERVER_URL: `http://localhost:${await freePort()}/mcp` });
  assertMissing(
    report,
    [0, /server: http\S+ cannot be reached: .*refused.*Start the server/i],
    [1, /token: 4\d\d access_denied: Service not found/],
  );
  assert.equal(statusOf(report, /challenge: not checked/), "cannot tell");
  assert.equal(statusOf(report, /metadata: not checked/), "cannot tell");
  assert.equal(statusOf(report, /initialize: not checked/), "cannot tell");
});

for (const status of [200, 502]) {
  test(`a tunnel's page with status ${status} is not taken for the server`, async (t) => {
    const page = "<!doctype html><title>ngrok</title><script>var x</script><p>Before you go on</p>";
    const { env } = await startBehindTunnel(t, (_, response) => {
      return sendPage(response, status, page, { "ngrok-error-code": "ERR_NGROK_6024" });
    });
    const report = await runDoctor({ ...env, PORT: "3456" });
    assertMissing(report, [0, /server: .* page "ngrok Before you go on" ERR_NGROK_6024, expected JSON/]);
    assert.equal(report.output.includes("does the tunnel point at PORT 3456?"), status === 502);
    assert.equal(statusOf(report, /challenge: not checked/), "cannot tell");
  });
}

test("another MCP_SERVER_URL than the running server's shows as such", async (t) => {
  const { env, url } = await start(t);
  const report = await runDoctor({
    ...env,
    MCP_SERVER_URL: `${url}/v2`,
    AUTH0_CLIENT_ID: "",
    AUTH0_CLIENT_SECRET: "",
  });
  assertMissing(
    report,
    [0, /call without a token: found 404, expected 401/],
    [0, /metadata: http\S+\/mcp\/v2 answers 404 .*expected 200 and JSON/],
    [0, /resource: found http\S+\/mcp, expected http\S+\/mcp\/v2/],
  );
  for (const check of ["challenge", "Origin and CORS", "bot rules"]) {
    assert.equal(
      statusOf(report, new RegExp(`${check}: not checked, since it needs the 401`)),
      "cannot tell",
    );
  }
});

test("another AUTH0_DOMAIN than the running server's, of the same tenant, shows as such", async (t) => {
  const { env } = await start(t);
  const domain = env.AUTH0_DOMAIN?.replace("localhost", "127.0.0.1") ?? "";
  const report = await runDoctor({ ...env, AUTH0_DOMAIN: domain });
  assertMissing(
    report,
    [0, /authorization server: found http:\/\/localhost:\d+\/, expected http:\/\/127/],
    [0, /issuer: found http:\/\/localhost:\d+\/, expected http:\/\/127.*"401 after a good login"/],
  );
  assert.equal(statusOf(report, /claims: not checked, since it needs the issuer/), "cannot tell");
});

test("a proxy that answers in the server's place shows in each of its answers", async (t) => {
  const { env, url } = await startBehindTunnel(t, ({ method, url = "", headers }, response) => {
    response.setHeader("age", "12");
    response.setHeader("content-type", "application/json");
    if (url.startsWith("/.well-known")) {
      response.end(JSON.stringify({ resource: "http://localhost:3000/mcp" }));
    } else if (method === "OPTIONS") {
      response.end();
    } else if (headers.authorization === undefined) {
      response.writeHead(401, { "www-authenticate": 'Bearer error="invalid_token"' }).end();
    } else {
      response.writeHead(403).end(JSON.stringify({ error: `forbidden: ${headers.authorization}` }));
    }
    return true;
  });
  const report = await runDoctor(env);
  assertMissing(
    report,
    [0, /challenge: found error="invalid_token", expected none/],
    [0, new RegExp(`resource: found http://localhost:3000/mcp, expected ${url}`)],
    [0, /authorization server: found none, expected http/],
    [0, /caches: found age: 12, expected none/],
    [0, /CORS: found POST 401 for nobody, expected POST 401 for https:\/\/chatgpt\.com/],
    [6, /initialize: 403 forbidden: Bearer \(hidden\)/], // quoted, but for the token
  );
  assert.doesNotMatch(report.output, /eyJ/);
});

test("a rule against bots that lets this doctor pass shows by the hosts that it turns away", async (t) => {
  const { env } = await startBehindTunnel(t, ({ headers }, response) => {
    if (!/openai|claude/i.test(headers["user-agent"] ?? "")) return false;
    return sendPage(response, 403, "<h1>Sorry, you have been blocked</h1>");
  });
  const blocked = '403 page "Sorry, you have been blocked"';
  assertMissing(await runDoctor(env), [
    0,
    new RegExp(`openai-mcp gets ${blocked}, Claude-User gets ${blocked}.*README, "403 from a bot rule"`),
  ]);
});

test("a preflight that is answered for older clients only names the headers that it lacks", async (t) => {
  const { env } = await startBehindTunnel(t, ({ method, headers }, response) => {
    if (method !== "OPTIONS") return false;
    response.writeHead(204, {
      "access-control-allow-origin": headers.origin,
      "access-control-allow-headers": "Authorization, Content-Type, MCP-Protocol-Version",
    }).end();
    return true;
  });
  assertMissing(await runDoctor(env), [0, /CORS: found no header mcp-method, mcp-name allowed/]);
});

test("tools that do not answer are named one by one", async (t) => {
  let calls = 0;
  const { env } = await startBehindTunnel(t, (request, response) => {
    if (request.method !== "POST" || request.headers.authorization === undefined) return false;
    calls++; // initialize, notifications/initialized, tools/list, tools/call
    if (calls < 3) return false;
    if (calls === 3) return sendPage(response, 502, "<title>Bad gateway</title>");
    void text(request).then((body) => {
      const { id } = JSON.parse(body);
      const result = { content: [{ type: "text", text: "Unknown tool" }], isError: true };
      response.setHeader("content-type", "application/json");
      response.end(JSON.stringify({ jsonrpc: "2.0", id, result }));
    });
    return true;
  });
  assertMissing(
    await runDoctor(env),
    [6, /tools\/list: 502 page "Bad gateway".*README, "ChatGPT shows no tools/],
    [6, /get_profile: .*Unknown tool/],
  );
});

test("the command line reads the server's .env, explains itself, and knows its options", async (t) => {
  const directory = await mkdtemp(join(tmpdir(), "doctor-"));
  t.after(() => rm(directory, { recursive: true }));
  await writeFile(join(directory, ".env"), "\uFEFFPORT=4001\r\nLOG_LEVEL=loud\r\n");
  const surroundings = { cwd: directory, env: { PATH: "", PORT: "4002" } }; // where no browser lies
  const run = (...args: string[]) => runCommandLine("doctor", args, surroundings).outcome;
  const [bare, help, unknown] = await Promise.all([run(), run("--help"), run("--brake")]);
  assert.equal(bare.status, 1);
  assert.match(bare.stdout, /^PORT: .*4002.*\n$/); // which differs from the environment's
  assert.match(
    bare.stderr,
    /^AUTH0_DOMAIN is missing: .*\nMCP_SERVER_URL is missing: .*\nLOG_LEVEL is 'loud'/,
  );
  assert.equal(help.status, 0);
  for (const option of ["--register", "--login", "--client", "--help"]) {
    assert.match(help.stdout, new RegExp(`^ +${option} `, "m"));
  }
  assert.equal(unknown.status, 1);
  assert.match(unknown.stderr, /^Unknown option '--brake'.*\n$/);
});
