/** What `npm run doctor` says of servers and of the sign-in, and its command line. */
import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { test, type TestContext } from "node:test";
import { main, type Options } from "./run/doctor/doctor.ts";
import { publishClientMetadata } from "./support/chatgpt.ts";
import { assertMissing, runDoctor, sendPage, start, startBehindTunnel, statusOf } from "./run/doctor/report.ts";
import type { Report } from "./run/doctor/report.ts";
import { freePort, runCommandLine } from "./support/server.ts";
import { ALICE, configuredTenant, FIXED_CLIENT, signIn, type Tenant } from "./support/tenant.ts";

test("the doctor reports a server that is down, and leaves out the checks that need it", async (t) => {
  const { env } = await start(t);
  const report = await runDoctor({ ...env, MCP_SERVER_URL: `http://localhost:${await freePort()}/mcp` });
  assertMissing(
    report,
    /^0 server: http\S+ cannot be reached: .*refused.*Start the server/i,
    /^1 token: 4\d\d access_denied: Service not found/,
  );
  assert.equal(statusOf(report, /challenge: not checked/), "cannot tell");
  assert.equal(statusOf(report, /metadata: not checked/), "cannot tell");
  assert.equal(statusOf(report, /initialize: not checked/), "cannot tell");
});

for (const status of [200, 502]) {
  test(`the doctor does not take a tunnel's page with status ${status} for the server`, async (t) => {
    const page = "<!doctype html><title>ngrok</title><script>var x</script><p>Before you go on</p>";
    const { env } = await startBehindTunnel(t, (_, response) => {
      return sendPage(response, status, page, { "ngrok-error-code": "ERR_NGROK_6024" });
    });
    const report = await runDoctor({ ...env, PORT: "3456" });
    assertMissing(report, /^0 server: .* page "ngrok Before you go on" ERR_NGROK_6024, expected JSON/);
    assert.equal(report.output.includes("does the tunnel point at PORT 3456?"), status === 502);
    assert.equal(statusOf(report, /challenge: not checked/), "cannot tell");
  });
}

test("the doctor reports an MCP_SERVER_URL that is not the running server's", async (t) => {
  const { env, url } = await start(t);
  const report = await runDoctor({ ...env, MCP_SERVER_URL: `${url}/v2`, AUTH0_CLIENT_ID: "", AUTH0_CLIENT_SECRET: "" });
  assertMissing(
    report,
    /^0 call without a token: found 404, expected 401/,
    /^0 metadata: http\S+\/mcp\/v2 answers 404 .*expected 200 and JSON/,
    /^0 resource: found http\S+\/mcp, expected http\S+\/mcp\/v2/,
  );
  for (const check of ["challenge", "Origin and CORS", "bot rules"]) {
    const said = new RegExp(`${check}: not checked, since it needs "call without a token"`);
    assert.equal(statusOf(report, said), "cannot tell");
  }
});

test("the doctor reports an AUTH0_DOMAIN of the same tenant that is not the running server's", async (t) => {
  const { env } = await start(t);
  const domain = env.AUTH0_DOMAIN?.replace("localhost", "127.0.0.1") ?? "";
  const report = await runDoctor({ ...env, AUTH0_DOMAIN: domain });
  assertMissing(
    report,
    /^0 authorization server: found http:\/\/localhost:\d+\/, expected http:\/\/127/,
    /^0 issuer: found http:\/\/localhost:\d+\/, expected http:\/\/127.*"401 after a good login"/,
  );
  assert.equal(statusOf(report, /^token: not checked, since it needs "issuer"/), "cannot tell");
});

test("the doctor reports each wrong answer of a proxy in the server's place", async (t) => {
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
    /^0 challenge: found error="invalid_token", expected none/,
    new RegExp(`^0 resource: found http://localhost:3000/mcp, expected ${url}`),
    /^0 authorization server: found none, expected http/,
    /^0 caches: found age: 12, expected none/,
    /^0 .*CORS: found POST 401 for nobody, expected POST 401 for https:\/\/chatgpt\.com/,
    /^0 initialize: 403 forbidden: Bearer \(hidden\)/, // without the token
  );
  assert.doesNotMatch(report.output, /eyJ/);
});

test("the doctor reports the hosts that a bot rule blocks, though it gets through itself", async (t) => {
  const { env } = await startBehindTunnel(t, ({ headers }, response) => {
    if (!/openai|claude/i.test(headers["user-agent"] ?? "")) return false;
    return sendPage(response, 403, "<h1>Sorry, you have been blocked</h1>");
  });
  const blocked = '403 page "Sorry, you have been blocked"';
  assertMissing(
    await runDoctor(env),
    new RegExp(`^0 .*openai-mcp gets ${blocked}, Claude-User gets ${blocked}.*README, "403 from a bot rule"`),
  );
});

test("the doctor reports which headers newer clients need and a preflight does not allow", async (t) => {
  const { env } = await startBehindTunnel(t, ({ method, headers }, response) => {
    if (method !== "OPTIONS") return false;
    response.writeHead(204, {
      "access-control-allow-origin": headers.origin,
      "access-control-allow-headers": "Authorization, Content-Type, MCP-Protocol-Version",
    }).end();
    return true;
  });
  assertMissing(await runDoctor(env), /^0 .*CORS: found no header mcp-method, mcp-name allowed/);
});

test("the doctor reports each request to the tools that fails", async (t) => {
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
    /^0 tools\/list: 502 page "Bad gateway".*README, "ChatGPT shows no tools/,
    /^0 get_profile: .*Unknown tool/,
  );
});

const page = (html: string, status = 200) => new Response(html, { status, headers: { "content-type": "text/html" } });
const OOPS = "<!doctype html><title>Error</title><h1>Oops!, something went wrong</h1><p>Tracking ID 42</p>";

/** Runs the doctor on a tenant with other answers than the stand-in's. */
async function runWith(t: TestContext, options: Options, beforeAnswer: Tenant["beforeAnswer"]): Promise<Report> {
  const { tenant, env } = await start(t);
  tenant.beforeAnswer = beforeAnswer;
  return await runDoctor(env, options);
}

test("the doctor leads to Step 1 after a refused code and an encrypted machine-to-machine token", async (t) => {
  const report = await runWith(t, { login: true }, ({ route, body }, answer) => {
    if (route !== "POST /oauth/token") return answer();
    if (!body.includes("client_credentials")) return Response.json({ error: "unauthorized_client" }, { status: 403 });
    return Response.json({ access_token: "a.b.c.d.e", token_type: "Bearer" });
  });
  assertMissing(
    report,
    /^1 token: 403 unauthorized_client Set the Default Permissions.*README, "API Settings"/,
    /^1 kind of token: found an encrypted one.*JSON Web Encryption.*README, "API Settings"/,
  );
});

test("the doctor reports a refresh token that does not work", async (t) => {
  const refused = { error: "invalid_grant", error_description: "Unknown" };
  const report = await runWith(t, { login: true }, ({ body }, answer) => {
    return body.includes("grant_type=refresh_token") ? Response.json(refused, { status: 403 }) : answer();
  });
  assertMissing(report, /^1 refresh token: 403 invalid_grant: Unknown/);
});

test("the doctor calls an error page that hides its cause neither ok nor missing", async (t) => {
  const report = await runWith(t, { register: true }, ({ route }, answer) => {
    return route === "GET /authorize" ? page(OOPS, 400) : answer();
  });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: 400 Error Oops!.*Monitoring → Logs/), "cannot tell");
});

test("the doctor reads the error from the URL of a tenant's own error page", async (t) => {
  const said = "no connections enabled for the client";
  const query = new URLSearchParams({ error: "invalid_request", error_description: said });
  const report = await runWith(t, { register: true }, ({ route }, answer) => {
    return route === "GET /authorize" ? Response.redirect(`https://example.com/oops?${query}`) : answer();
  });
  assertMissing(report, /^3 sign-in page: invalid_request: no connections enabled for the client/);
});

test("the doctor finds a sign-in page behind a redirect and a cookie", async (t) => {
  const headers = { "location": "/u/login?state=1", "set-cookie": "did=1; Path=/; HttpOnly" };
  const report = await runWith(t, { register: true }, ({ route, headers: { cookie } }, answer) => {
    if (route === "GET /authorize") return new Response(null, { status: 302, headers });
    if (route !== "GET /u/login") return answer();
    return cookie === "did=1" ? page("<h1>Log in</h1>") : page(OOPS, 400);
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

test("after a metadata document of another issuer neither a secret nor a registration is sent anywhere", async (t) => {
  const asked: string[] = [];
  const report = await runWith(t, { login: true }, async ({ route }, answer) => {
    asked.push(route);
    return Response.json({ ...await (await answer()).json(), issuer: "https://other.example/" });
  });
  assertMissing(report, /^0 issuer: found https:\/\/other\.example\/, expected http/);
  assert.equal(statusOf(report, /registration: not checked, since it needs "issuer"/), "cannot tell");
  assert.deepEqual(asked.filter((route) => !route.startsWith("GET /.well-known/")), []);
});

for (const iss of ["none", "https://other.example/"]) {
  test(`after an answer with ${iss === "none" ? "no" : "another"} iss the doctor exchanges no code`, async (t) => {
    const { tenant, env } = await start(t);
    tenant.settings.includeIssuerInAuthorizationResponses = true;
    const report = await runDoctor(env, { login: true }, async (url) => {
      const callback = await signIn(url, ALICE);
      if (iss === "none") callback.searchParams.delete("iss");
      else callback.searchParams.set("iss", iss);
      return callback;
    });
    assertMissing(
      report,
      new RegExp(`^2b issuer of the answer: found ${iss}, expected http.*README, "The answer names no issuer"`),
    );
    assert.equal(statusOf(report, /token: not checked, since it needs "issuer of the answer"/), "cannot tell");
    assert.ok(!tenant.logs.some(({ type }) => type === "seacft"));
  });
}

test("a strict client that gets an ID token is held to the scopes that it asked for", async (t) => {
  const { env, tenant, url } = await start(t);
  Object.assign(tenant.settings, configuredTenant("strict", url));
  tenant.beforeAnswer = async ({ route }, answer) => {
    const reply = await answer();
    return route === "POST /oauth/token" ? Response.json({ ...await reply.json(), id_token: "a.b.c" }) : reply;
  };
  const report = await runDoctor(env, { login: true });
  assert.match(report.output, /kind of client: strict/);
  assertMissing(report, /^4 OpenID Connect scopes: not granted: .*"OAUTH_SCOPES_MISMATCH"/);
});

test("the doctor registers nothing, and asks for no registration, where it is given a fixed application", async (t) => {
  const { tenant, env, url } = await start(t);
  const { client_id: client } = FIXED_CLIENT;
  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed"));
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
  assert.doesNotMatch(report.output, /registration:/);
  assert.equal(tenant.settings.applications.length, 2);

  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed", "callback"));
  assertMissing(
    await runDoctor(env, { client }),
    /^5 sign-in page: .*Callback URL mismatch.*README, "Callback URL mismatch"/,
  );
});

test("the doctor tries a fixed application with the callback that ChatGPT will use, and with no other", async (t) => {
  const { tenant, env, url } = await start(t);
  const { client_id: client } = FIXED_CLIENT;
  Object.assign(tenant.settings, configuredTenant("strict", url, "fixed", "include-issuer"));
  const unknown = await runDoctor(env, { client });
  assert.equal(
    statusOf(unknown, /client: Include Issuer is off: .*\/oauth\/\{callback_id\}.* --callback/),
    "cannot tell",
  );
  assert.equal(statusOf(unknown, /sign-in page: not checked/), "cannot tell");

  const callback = "https://chatgpt.com/connector/oauth/one";
  assertMissing(await runDoctor(env, { client, callback }), /^5 .*Callback URL mismatch: \S+\/oauth\/one /);
  for (const application of tenant.settings.applications) application.callbackUrls = [callback];
  assertMissing(await runDoctor(env, { client, callback }));
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  assertMissing(
    await runDoctor(env, { client }),
    /^5 .*Callback URL mismatch: \S+\/connector_platform_oauth_redirect /,
  );
});

test("the doctor's last line says what was not tried, and how to try it", async (t) => {
  const { env } = await start(t);
  const notTried = async (options: Options, changes: Record<string, string> = {}) =>
    /\nNot tried: (.*)\.\n$/.exec((await runDoctor({ ...env, ...changes }, options)).output)?.[1];
  const page = "the sign-in page (npm run doctor -- --register, or --client ID)";
  const signIn = "a sign-in (npm run doctor -- --login)";
  assert.equal(await notTried({}), `${page}, ${signIn}`);
  assert.equal(await notTried({ register: true }), signIn);
  assert.equal(await notTried({ client: "fixed" }), "a sign-in as this client, which only ChatGPT can do");
  assert.equal(await notTried({ login: true }), undefined);
  const withoutMachine = await notTried({ login: true }, { AUTH0_CLIENT_ID: "", AUTH0_CLIENT_SECRET: "" });
  assert.equal(withoutMachine, "a machine-to-machine token (AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set)");
});

// A search that starts again at each tag would take minutes.
for (const tag of ["<script ", "<style>", "<"]) {
  test(`the doctor reads a page of 400 kB of ${tag} without delay`, async (t) => {
    const page = `<p>Please wait</p>${tag.repeat(400_000 / tag.length)}`;
    const { env } = await startBehindTunnel(t, (_, response) => sendPage(response, 503, page));
    assertMissing(await runDoctor(env), /^0 server: .* page "Please wait/);
  });
}

test("a client's document is good once the tenant takes such documents and has imported it", async (t) => {
  const { tenant, env, url } = await start(t);
  const documents = await publishClientMetadata();
  t.after(documents.close);
  const client = documents.url();
  assertMissing(await runDoctor(env, { client }), /^2b client: CIMD is off.*Switch CIMD on/);
  Object.assign(tenant.settings, configuredTenant("permissive", url, "cimd"));
  assertMissing(await runDoctor(env, { client: `${url}x` }), /^2b client: http\S+ answers 404 .*copy the address/);
  assertMissing(await runDoctor(env, { client }), /^2b sign-in page: .*Unknown client: http\S+client\.json .*Import/);
  await tenant.importFromUrl(client);
  const report = await runDoctor(env, { client });
  assertMissing(report);
  assert.equal(statusOf(report, /client: http\S+client\.json, called back at https:\/\/chatgpt\.com\//), "ok");
  assert.equal(statusOf(report, /sign-in page: opens/), "ok");
});

test("npm run doctor reads the server's .env, prints its help, and refuses unknown options", async (t) => {
  const directory = await mkdtemp(join(tmpdir(), "doctor-"));
  t.after(() => rm(directory, { recursive: true }));
  await writeFile(join(directory, ".env"), "\uFEFFPORT=4001\r\nLOG_LEVEL=loud\r\n");
  const surroundings = { cwd: directory, env: { PATH: "" } }; // without a browser
  const bare = await runCommandLine("doctor", [], surroundings).outcome;
  assert.deepEqual([bare.status, bare.stdout], [1, ""]);
  assert.match(bare.stderr, /^AUTH0_DOMAIN is missing: .*\nMCP_SERVER_URL is missing: .*\nLOG_LEVEL is "loud": .*\n$/);
  const help: string[] = [];
  assert.equal(await main(["--help"], (text) => help.push(text)), 0);
  for (const option of ["--register", "--login", "--client", "--callback", "--help"]) {
    assert.match(help.join("\n"), new RegExp(`^ +${option} `, "m"));
  }
  await assert.rejects(main(["--brake"], assert.fail), {
    message: "Unknown option '--brake': --help shows the options",
  });
  const both = { client: "fixed", login: true };
  await assert.rejects(runDoctor({}, both), /--client goes with neither --register nor --login/);
  await assert.rejects(runDoctor({}, { callback: "https://chatgpt.com/x" }), /--callback goes with --client/);
});
