/** `npm run doctor`: against servers, good and bad, on the way through the sign-in, and its command line. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { main } from "./run/doctor/doctor.ts";
import type { Options } from "./run/doctor/doctor.ts";
import { publishClientMetadata } from "./support/chatgpt.ts";
import {
  assertMissing,
  runDoctor,
  sendPage,
  start,
  startBehindTunnel,
  startWithTenantThat,
  statusOf,
} from "./run/doctor/report.ts";
import type { Intercept, Report } from "./run/doctor/report.ts";
import { freePort, runCommandLine } from "./support/server.ts";
import { configuredTenant, FIXED_CLIENT } from "./support/tenant-settings.ts";

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

const OOPS = "<!doctype html><title>Error</title><h1>Oops!, something went wrong</h1><p>Tracking ID 42</p>";

async function runWith(t: TestContext, options: Options, intercept: Intercept): Promise<Report> {
  const { env } = await startWithTenantThat(t, { intercept });
  return await runDoctor(env, options);
}

test("a refused code and an encrypted machine-to-machine token point to Step 1", async (t) => {
  const report = await runWith(t, { login: true }, ({ url }, response, body) => {
    if (url !== "/oauth/token") return false;
    response.setHeader("content-type", "application/json");
    if (body.includes("client_credentials")) {
      response.end(JSON.stringify({ access_token: "a.b.c.d.e", token_type: "Bearer" }));
    } else {
      response.writeHead(403).end(JSON.stringify({ error: "unauthorized_client" }));
    }
    return true;
  });
  assertMissing(
    report,
    [1, /kind of token: found an encrypted one.*JSON Web Encryption.*README, "API Settings"/],
    [1, /token: 403 unauthorized_client Set the Default Permissions.*README, "API Settings"/],
  );
});

test("a refresh token that does not work is missing", async (t) => {
  const report = await runWith(t, { login: true }, ({ url }, response, body) => {
    if (url !== "/oauth/token" || !body.includes("grant_type=refresh_token")) return false;
    response.writeHead(403).end(JSON.stringify({ error: "invalid_grant", error_description: "Unknown" }));
    return true;
  });
  assertMissing(report, [1, /refresh token: 403 invalid_grant: Unknown/]);
});

test("an error page that hides its cause is neither ok nor blamed on a step", async (t) => {
  const report = await runWith(t, { register: true }, ({ url = "" }, response) => {
    return url.startsWith("/authorize") && sendPage(response, 400, OOPS);
  });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: 400 Error Oops!.*Monitoring → Logs/), "cannot tell");
});

test("an error page of the tenant's own is read from its address", async (t) => {
  const said = "no connections enabled for the client";
  const report = await runWith(t, { register: true }, ({ url = "" }, response) => {
    if (!url.startsWith("/authorize")) return false;
    const query = new URLSearchParams({ error: "invalid_request", error_description: said });
    response.writeHead(302, { location: `https://example.com/oops?${query}` }).end();
    return true;
  });
  assertMissing(report, [3, /sign-in page: invalid_request: no connections enabled for the client/]);
});

test("a sign-in page behind a redirect and a cookie is found", async (t) => {
  const report = await runWith(t, { register: true }, ({ url = "", headers }, response) => {
    if (url.startsWith("/authorize")) {
      response.writeHead(302, { "location": "/u/login?state=1", "set-cookie": "did=1; Path=/; HttpOnly" })
        .end();
      return true;
    }
    if (!url.startsWith("/u/login")) return false;
    return headers.cookie === "did=1" ? sendPage(response, 200, "<h1>Log in</h1>") : sendPage(response, 400, OOPS);
  });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
});

test("the tenant's issuer identification decides which callback and document of ChatGPT's are named", async (t) => {
  const { tenant, env } = await start(t);
  tenant.settings.clientIdMetadataDocumentRegistration = true;
  const off = await runDoctor(env);
  assertMissing(off);
  assert.match(off.output, /issuer identification: off: .* https:\/\/chatgpt\.com\/connector\/oauth\/\{callback_id\}/);
  assert.match(off.output, /CIMD: advertised: .* https:\/\/chatgpt\.com\/oauth\/\{callback_id\}\/client\.json/);

  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const on = await runDoctor(env, { login: true });
  assertMissing(on);
  assert.match(on.output, /issuer identification: on: .* https:\/\/chatgpt\.com\/connector_platform_oauth_redirect/);
  assert.match(on.output, /CIMD: advertised: .* https:\/\/chatgpt\.com\/oauth\/client\.json/);
  assert.equal(statusOf(on, /issuer of the answer: http/), "ok");
});

test("an issuer that is advertised and not sent is missing", async (t) => {
  const { tenant, env } = await start(t);
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  tenant.withholdsIssuer = true;
  assertMissing(await runDoctor(env, { login: true }), [
    2,
    /issuer of the answer: found none, expected http.*README, "The answer names no issuer"/,
  ]);
});

test("a strict client that gets an ID token is held to the scopes that it asked for", async (t) => {
  const rewrite = (body: string) => body.replace('{"access_token":', '{"id_token":"a.b.c","access_token":');
  const { env } = await startWithTenantThat(t, { kind: "strict", rewrite });
  const report = await runDoctor(env, { login: true });
  assert.match(report.output, /kind of client: strict/);
  assertMissing(report, [4, /OpenID Connect scopes: not granted: .*"OAUTH_SCOPES_MISMATCH"/]);
});

test("a fixed application needs no registration, and one is neither made nor asked for", async (t) => {
  const { tenant, env, url } = await start(t);
  const { client_id: client } = FIXED_CLIENT;
  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed"));
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
  assert.doesNotMatch(report.output, /registration:/);
  assert.equal(tenant.settings.applications.length, 2);

  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed", "callback"));
  assertMissing(await runDoctor(env, { client }), [
    5,
    /sign-in page: .*Callback URL mismatch.*README, "Callback URL mismatch"/,
  ]);
});

test("a client's document is good once the tenant takes such documents and has imported it", async (t) => {
  const { tenant, env, url } = await start(t);
  const documents = await publishClientMetadata();
  t.after(documents.close);
  const client = documents.url();
  assertMissing(await runDoctor(env, { client }), [2, /client: CIMD is off.*Switch CIMD on/]);
  Object.assign(tenant.settings, configuredTenant("permissive", url, "cimd"));
  assertMissing(await runDoctor(env, { client: `${url}x` }), [
    2,
    /client: http\S+ answers 404 .*copy the address/,
  ]);
  assertMissing(await runDoctor(env, { client }), [2, /sign-in page: .*Unknown client: http\S+client\.json .*Import/]);
  await tenant.importFromUrl(client);
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(
    statusOf(report, /client: http\S+client\.json, called back at https:\/\/chatgpt\.com\//),
    "ok",
  );
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
});

test("the command line reads the server's .env, explains itself, and knows its options", async (t) => {
  const directory = await mkdtemp(join(tmpdir(), "doctor-"));
  t.after(() => rm(directory, { recursive: true }));
  await writeFile(join(directory, ".env"), "\uFEFFPORT=4001\r\nLOG_LEVEL=loud\r\n");
  const surroundings = { cwd: directory, env: { PATH: "", PORT: "4002" } }; // where no browser lies
  const bare = await runCommandLine("doctor", [], surroundings).outcome;
  assert.equal(bare.status, 1);
  assert.match(bare.stdout, /^PORT differs .*4002.*\n$/); // which differs from the environment's
  assert.match(bare.stderr, /^AUTH0_DOMAIN is missing: .*\nMCP_SERVER_URL is missing: .*\nLOG_LEVEL is no log level/);
  const help: string[] = [];
  assert.equal(await main(["--help"], (text) => help.push(text)), 0);
  for (const option of ["--register", "--login", "--client", "--help"]) {
    assert.match(help.join("\n"), new RegExp(`^ +${option} `, "m"));
  }
  await assert.rejects(main(["--brake"], assert.fail), /^TypeError.*: Unknown option '--brake'[^\n]*$/);
});
