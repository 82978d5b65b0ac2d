/** `npm run doctor` as a user runs it: a process of its own, against good and bad servers and tenants. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createServer as createHttpServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text } from "node:stream/consumers";
import { after, before, beforeEach, describe, test } from "node:test";
import type { TestContext } from "node:test";
import { createServer } from "../server.ts";
import { freePort, RUNTIME_FLAGS, startServer } from "./support/server.ts";
import type { RunningServer } from "./support/server.ts";
import { ALICE, configuredTenant, signIn, startTenant } from "./support/tenant.ts";
import type { Tenant, TenantKind } from "./support/tenant.ts";

const README = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const KINDS: TenantKind[] = ["permissive", "strict"];

type Environment = Record<string, string>;
/** Shows the user a page, and returns where the browser is sent from there. */
type Browser = (authorizeUrl: string) => Promise<URL>;

interface Report {
  status: number;
  stdout: string;
  stderr: string;
  /** Of each check: its status, its step, and all that is said of it, in one line. */
  checks: { status: string; step: number; said: string }[];
}

const asAlice: Browser = (url) => signIn(url, ALICE);

/** Runs the doctor and signs in where it asks for that. Every heading it names must be in the README. */
async function run(env: Environment, args: string[] = [], browser: Browser = asAlice): Promise<Report> {
  const doctor = spawn(process.execPath, [...RUNTIME_FLAGS, `${import.meta.dirname}/run/doctor.ts`, ...args], {
    cwd: import.meta.dirname, // where no .env lies
    env: { ...env, PATH: "" }, // where no browser lies
    stdio: ["ignore", "pipe", "pipe"],
  });
  let stdout = "";
  let page: Promise<unknown> | undefined;
  doctor.stdout.setEncoding("utf8").on("data", (chunk: string) => {
    stdout += chunk;
    const [, url] = /^(http\S+\/authorize\?\S+)\n/m.exec(stdout) ?? [];
    if (url === undefined || page !== undefined) return;
    page = browser(url).then((callback) => fetch(callback));
    page.catch(() => doctor.kill()); // it would wait for minutes
  });
  const [stderr, [status]] = await Promise.all([text(doctor.stderr), once(doctor, "close")]);
  await page;
  const checks = [...stdout.matchAll(/^(ok|missing|cannot tell) +Step (\d) {2}(.*(?:\n {21}.*)*)/gm)];
  for (const [, heading = ""] of stdout.matchAll(/README, "(.*)"/g)) {
    assert.match(README, new RegExp(`^#+ ${heading.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}`, "m"));
  }
  return {
    status,
    stdout,
    stderr,
    checks: checks.map(([, status = "", step, said = ""]) => ({
      status,
      step: Number(step),
      said: said.replace(/\n +/g, " "),
    })),
  };
}

function environment(tenant: string, serverUrl: string): Environment {
  return {
    AUTH0_DOMAIN: tenant,
    MCP_SERVER_URL: serverUrl,
    AUTH0_CLIENT_ID: "machine",
    AUTH0_CLIENT_SECRET: "machine-secret",
  };
}

/** The server, and a tenant that is configured for it as the README says. */
async function start(t: TestContext, serverEnv: Environment = {}, create?: typeof createServer) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, ...serverEnv }, undefined, create);
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant("permissive", server.url));
  return { tenant, url: server.url, env: environment(tenant.origin, server.url) };
}

/** Answers a request in the place of another, and says whether it has. */
type Intercept = (request: IncomingMessage, response: ServerResponse, body: string) => boolean;

/** The same behind a tunnel that answers some requests by itself. */
function startBehindTunnel(t: TestContext, intercept: Intercept) {
  return start(t, {}, (settings, store) => {
    const server = createServer(settings, store);
    return createHttpServer((request, response) => {
      if (!intercept(request, response, "")) server.emit("request", request, response);
    });
  });
}

/** Gives the tenant another address, where some requests are answered otherwise than by the stand-in. */
async function startTenantFront(
  t: TestContext,
  tenant: Tenant,
  intercept: Intercept,
  rewrite: (body: string) => string = (body) => body,
): Promise<string> {
  const inner = tenant.origin;
  const front = createHttpServer(async (request, response) => {
    const body = await text(request);
    if (intercept(request, response, body)) return;
    const { method = "", headers, url = "" } = request;
    const reply = await fetch(inner + url, {
      method,
      redirect: "manual",
      headers: { "content-type": headers["content-type"] ?? "" },
      ...(method === "POST" && { body }),
    });
    response.writeHead(reply.status, Object.fromEntries(reply.headers)).end(rewrite(await reply.text()));
  });
  await once(front.listen(0, "127.0.0.1"), "listening");
  t.after(() => {
    front.close();
    front.closeAllConnections();
  });
  const origin = `http://localhost:${(front.address() as AddressInfo).port}`;
  Object.defineProperty(tenant, "origin", { value: origin }); // it is the issuer, too
  return origin;
}

function sendPage(response: ServerResponse, status: number, html: string, headers: Environment = {}): true {
  response.writeHead(status, { "content-type": "text/html", ...headers }).end(html);
  return true;
}

/** Asserts what is missing, step and words, in order and nothing else, and what the exit status says of it. */
function assertMissing(
  { status, stdout, checks }: Report,
  ...expected: [step: number, said: RegExp][]
): void {
  const missing = checks.filter((check) => check.status === "missing");
  assert.deepEqual(missing.map(({ step }) => step), expected.map(([step]) => step), stdout);
  for (const [index, [, said]] of expected.entries()) assert.match(missing[index]?.said ?? "", said);
  const [first] = expected;
  assert.equal(status, first === undefined ? 0 : 1, stdout);
  const summary = first && `${expected.length} missing: start with Step ${first[0]}.`;
  assert.match(stdout, new RegExp(`\n${summary ?? "Nothing is missing, as far as was checked."}\n$`));
}

/** What is said of the one check that says this. */
function statusOf({ checks, stdout }: Report, said: RegExp): string {
  const found = checks.filter((check) => said.test(check.said));
  assert.equal(found.length, 1, `${said} in ${stdout}`);
  return found[0]?.status ?? "";
}

/** What each setting of the guide shows when it is left out; where it stops nothing, two at once. */
const LEFT_OUT: {
  settings: string;
  kinds?: TenantKind[];
  leaveOut: (settings: Tenant["settings"]) => void;
  env?: Environment;
  missing: [step: number, said: RegExp][];
}[] = [
  {
    settings: "Dynamic Client Registration, and AUTH0_CLIENT_SECRET",
    leaveOut: (settings) => settings.dynamicClientRegistration = false,
    env: { AUTH0_CLIENT_SECRET: "" },
    missing: [
      [2, /registration: 4\d\d .*registration is disabled.*"Enable client registration"/],
      [6, /token: AUTH0_CLIENT_SECRET is not set/],
    ],
  },
  {
    settings: "room for another application, and the right AUTH0_CLIENT_SECRET",
    leaveOut: (settings) => settings.applicationLimit = 1,
    env: { AUTH0_CLIENT_SECRET: "wrong" },
    missing: [
      [2, /registration: 403 .*You reached the limit.*README, "You reached the limit/],
      [6, /token: 401 .*Unauthorized.*Compare the two settings/],
    ],
  },
  {
    settings: "a domain-level connection, and the machine-to-machine application's authorization",
    leaveOut(settings) {
      for (const connection of settings.connections) connection.domainLevel = false;
      for (const application of settings.applications) application.authorizedApis = [];
    },
    missing: [
      [3, /sign-in page: .*no connections enabled for the client.*README, "no connections enabled/],
      [6, /token: 403 access_denied: Client is not authorized to access .*authorize the application/],
    ],
  },
  {
    settings: "the Identifier of the API",
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.identifier += "/"),
    missing: [
      [1, /sign-in page: .*Service not found: http\S+\/mcp .*README, "Service not found"/],
      [1, /token: .*Service not found: http\S+\/mcp /],
    ],
  },
  {
    settings: "the Identifier of the API, with the Default Audience wrong likewise",
    kinds: ["permissive"],
    leaveOut(settings) {
      for (const api of settings.apis) api.identifier += "/";
      settings.defaultAudience += "/";
    },
    missing: [
      [1, /token: .*Service not found: http\S+\/mcp /],
      [1, /claims: Token has the audience http\S+\/mcp\/,http\S+, expected http\S+\/mcp: /],
      [1, /initialize: 401 Token has the audience/],
    ],
  },
  {
    settings: "the Default Audience, where tokens are then encrypted",
    kinds: ["permissive"],
    leaveOut: (settings) => settings.defaultAudience = "",
    missing: [[2, /kind of token: found an encrypted one \(JWE, 5 parts\), expected a JWT.*"Step 2"/]],
  },
  {
    settings: "the Default Audience, where tokens are then opaque",
    kinds: ["strict"],
    leaveOut: (settings) => Object.assign(settings, { defaultAudience: "", userinfoToken: "opaque" }),
    missing: [[2, /kind of token: found an opaque one, expected a JWT/]],
  },
  {
    settings: "the right Default Audience",
    kinds: ["strict"],
    leaveOut: (settings) => settings.defaultAudience += "/",
    missing: [[2, /sign-in page: .*Service not found: http\S+\/mcp\/ .*Default Audience/]],
  },
  {
    settings: "Default Permissions",
    kinds: ["strict"],
    leaveOut: (settings) =>
      settings.apis.forEach((api) => delete api.defaultPermissionsForThirdPartyApplications),
    missing: [[1, /sign-in page: .*Client "tpc_\w+" is not authorized to access .*Default Permissions/]],
  },
  {
    settings: "Allow Offline Access",
    kinds: ["strict"],
    leaveOut: (settings) => settings.apis.forEach((api) => api.allowOfflineAccess = false),
    missing: [[1, /refresh token: found none.*README, "No refresh token"/]],
  },
  {
    settings: "the Action, and Allow Offline Access",
    kinds: ["permissive"],
    leaveOut(settings) {
      settings.postLoginAction = false;
      for (const api of settings.apis) api.allowOfflineAccess = false;
    },
    missing: [
      [4, /scopes: not granted: \S.* asked .* granted .*"OAUTH_SCOPES_MISMATCH"/],
      [1, /refresh token: found none.*README, "No refresh token"/],
    ],
  },
];

describe("npm run doctor", { concurrency: 2 }, () => {
  for (const kind of KINDS) {
    describe(`on a ${kind} tenant`, { concurrency: 1 }, () => {
      let tenant: Tenant;
      let server: RunningServer;
      let env: Environment;

      before(async () => {
        tenant = await startTenant();
        server = await startServer({ AUTH0_DOMAIN: tenant.origin });
        env = environment(tenant.origin, server.url);
      });
      beforeEach(() => {
        Object.assign(tenant.settings, configuredTenant(kind, server.url));
      });
      after(async () => {
        await server.close();
        await tenant.close();
      });

      test("every check is ok, as far as the tools for a user who signs in, and no secret is printed", async () => {
        const secrets = ["machine-secret"];
        const report = await run(env, ["--login"], async (url) => {
          const callback = await signIn(url, ALICE);
          secrets.push(callback.searchParams.get("code") ?? "");
          const forged = new URL(callback);
          forged.searchParams.set("state", "another");
          assert.equal((await fetch(forged)).status, 404); // an answer to a question that was not asked
          return callback;
        });
        assertMissing(report);
        assert.ok(report.checks.every(({ status }) => status === "ok"), report.stdout);
        assert.match(report.stdout, new RegExp(`kind of client: ${kind}`));
        assert.match(report.stdout, new RegExp(`^ +aud +${server.url}`, "m"));
        assert.match(report.stdout, /get_profile: \{"id":"machine@clients"\}/);
        assert.match(report.stdout, /asked +address .*\n +granted +(address .*|offline_access)\n/);
        assert.match(report.stdout, /refresh token: works, and is rotated/);
        assert.match(report.stdout, /get_profile: \{"id":"auth0\|alice"\}/);
        assert.equal(secrets.length, 2);
        for (const secret of secrets) assert.ok(secret !== "" && !report.stdout.includes(secret));
        assert.doesNotMatch(report.stdout, /eyJ/); // how a JWT begins
        assert.ok(tenant.settings.applications.some(({ name }) => name === "chatgpt-auth0-mcp doctor"));
      });

      for (const { settings, kinds = KINDS, leaveOut, env: changes, missing } of LEFT_OUT) {
        if (!kinds.includes(kind)) continue;
        test(`it says what is missing without ${settings}`, async () => {
          leaveOut(tenant.settings);
          assertMissing(await run({ ...env, ...changes }, ["--login"]), ...missing);
        });
      }

      if (kind === "permissive") {
        test("without options and credentials nothing is created, and the rest is not claimed", async () => {
          const report = await run({ ...env, AUTH0_CLIENT_ID: "", AUTH0_CLIENT_SECRET: "" });
          assertMissing(report);
          assert.equal(tenant.settings.applications.length, 1);
          assert.equal(statusOf(report, /npm run doctor -- --register/), "cannot tell");
          assert.equal(
            statusOf(report, /AUTH0_CLIENT_ID and AUTH0_CLIENT_SECRET are not set/),
            "cannot tell",
          );
          assert.equal(statusOf(report, /npm run doctor -- --login/), "cannot tell");
        });

        test("a user who declines has left no setting out", async () => {
          const report = await run(env, ["--login"], (url) => signIn(url, ALICE, "decline"));
          assertMissing(report);
          assert.equal(statusOf(report, /sign-in: access_denied: User did not authorize/), "cannot tell");
          assert.equal(statusOf(report, /refresh token: not checked/), "cannot tell");
        });
      }

      if (kind === "strict") {
        test("registration that is off where CIMD is on is not called missing", async () => {
          tenant.settings.dynamicClientRegistration = false;
          tenant.settings.clientIdMetadataDocumentRegistration = true;
          const report = await run(env, ["--register"]);
          assertMissing(report);
          assert.equal(statusOf(report, /CIMD: advertised/), "ok");
          assert.equal(statusOf(report, /registration: off, and CIMD is on/), "cannot tell");
          assert.equal(statusOf(report, /sign-in page: not checked/), "cannot tell");
        });

        test("the Resource Parameter Profile does for the Default Audience, and any profile of the API", async () => {
          Object.assign(tenant.settings, {
            defaultAudience: "",
            resourceParameterCompatibilityProfile: true,
          });
          for (const api of tenant.settings.apis) api.accessTokenProfile = "rfc9068";
          const report = await run(env, ["--login"]);
          assertMissing(report);
          assert.match(report.stdout, /typ at\+jwt/);
        });
      }
    });
  }

  describe("with ENFORCE_SCOPES", { concurrency: 1 }, () => {
    test("a user's permission is missing where RBAC is on and no role gives it", async (t) => {
      const { env, tenant } = await start(t, { ENFORCE_SCOPES: "true" });
      for (const api of tenant.settings.apis) api.enableRbac = true;
      const report = await run(env, ["--login"]);
      assertMissing(report, [
        1,
        /scopes of the API: found no tasks:read tasks:write.*README, "Permissions per tool"/,
      ]);
      assert.match(report.stdout, /scopes of the API: tasks:read tasks:write/); // of the machine-to-machine token
    });
  });

  describe("between the server and the world", { concurrency: 1 }, () => {
    test("a server that is down is what is missing, and nothing of it is claimed", async (t) => {
      const { env } = await start(t);
      const report = await run({ ...env, MCP_SERVER_URL: `http://localhost:${await freePort()}/mcp` });
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
        const report = await run(env);
        assertMissing(report, [0, /server: .* page "ngrok Before you go on" ERR_NGROK_6024, expected JSON/]);
        assert.equal(statusOf(report, /challenge: not checked/), "cannot tell");
      });
    }

    test("another MCP_SERVER_URL than the running server's shows as such", async (t) => {
      const { env, url } = await start(t);
      const report = await run({
        ...env,
        MCP_SERVER_URL: `${url}/v2`,
        AUTH0_CLIENT_ID: "",
        AUTH0_CLIENT_SECRET: "",
      });
      assertMissing(
        report,
        [0, /call without a token: found 404, expected 401/],
        [0, /challenge: found none, expected http\S+\/mcp\/v2/],
        [0, /metadata: http\S+\/mcp\/v2 answers 404 .*expected 200 and JSON/],
        [0, /resource: found http\S+\/mcp, expected http\S+\/mcp\/v2/],
        [0, /CORS: found POST 404/],
      );
    });

    test("another AUTH0_DOMAIN than the running server's, of the same tenant, shows as such", async (t) => {
      const { env } = await start(t);
      const domain = env.AUTH0_DOMAIN?.replace("localhost", "127.0.0.1") ?? "";
      assertMissing(
        await run({ ...env, AUTH0_DOMAIN: domain }),
        [0, /authorization server: found http:\/\/localhost:\d+\/, expected http:\/\/127/],
        [0, /issuer: found http:\/\/localhost:\d+\/, expected http:\/\/127.*"401 after a good login"/],
        [0, /claims: Token has the issuer http:\/\/localhost:\d+\/, expected http:\/\/127/],
      );
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
      const report = await run(env);
      assertMissing(
        report,
        [0, /challenge: found error="invalid_token", expected none/],
        [0, new RegExp(`resource: found http://localhost:3000/mcp, expected ${url}`)],
        [0, /authorization server: found none, expected http/],
        [0, /caches: found age: 12, expected none/],
        [0, /CORS: found POST 401 for nobody, expected POST 401 for https:\/\/chatgpt\.com/],
        [6, /initialize: 403 forbidden: Bearer \(hidden\)/], // quoted, but for the token
      );
      assert.doesNotMatch(report.stdout, /eyJ/);
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
        await run(env),
        [6, /tools\/list: 502 page "Bad gateway".*README, "ChatGPT shows no tools/],
        [6, /get_profile: .*Unknown tool/],
      );
    });
  });

  describe("between the doctor and the tenant", { concurrency: 1 }, () => {
    test("a domain where no tenant answers is what is missing, and HTTPS for any but the stand-in", async (t) => {
      const { env } = await start(t);
      const report = await run({ ...env, AUTH0_DOMAIN: `https://localhost:${await freePort()}` }, [
        "--login",
      ]);
      assertMissing(
        report,
        [0, /HTTPS: found http:\S+, expected https.*open a tunnel/],
        [0, /authorization server: found/],
        [0, /discovery: http\S+openid-configuration cannot be reached.*AUTH0_DOMAIN/],
      );
      assert.equal(statusOf(report, /registration: not checked/), "cannot tell");
    });

    test("signing keys that cannot be had are named, and no token is called good without them", async (t) => {
      const { env, tenant } = await start(t);
      tenant.answerJwks = (response) => response.writeHead(500).end();
      assertMissing(
        await run(env),
        [0, /signing keys: http\S+jwks\.json answers 500.*README, "503 Service Unavailable"/],
        [1, /claims: Auth0's signing keys cannot be had/],
        [6, /initialize: 503 Auth0's signing keys cannot be had/],
      );
    });

    test("a tenant without S256 and a key for RS256 is named for both, and one that is busy for nothing", async (t) => {
      const tenant = await startTenant();
      t.after(() => tenant.close());
      tenant.answerJwks = (response) => response.end(JSON.stringify({ keys: [{ kty: "EC", alg: "ES256" }] }));
      const AUTH0_DOMAIN = await startTenantFront(t, tenant, ({ url }, response) => {
        if (url !== "/oidc/register") return false;
        response.writeHead(429).end("{}");
        return true;
      }, (body) => body.replace('"S256",', ""));
      const server = await startServer({ AUTH0_DOMAIN });
      t.after(() => server.close());
      const report = await run({ AUTH0_DOMAIN, MCP_SERVER_URL: server.url }, ["--register"]);
      assertMissing(
        report,
        [0, /PKCE: found plain, expected S256/],
        [0, /signing keys: found none for RS256 among 1, expected one/],
      );
      assert.equal(statusOf(report, /registration: 429.*try again/), "cannot tell");
    });

    const OOPS =
      "<!doctype html><title>Error</title><h1>Oops!, something went wrong</h1><p>Tracking ID 42</p>";

    /** Runs where the tenant answers in Auth0's ways rather than the stand-in's. */
    async function runWith(t: TestContext, option: string, intercept: Intercept): Promise<Report> {
      const tenant = await startTenant();
      t.after(() => tenant.close());
      const AUTH0_DOMAIN = await startTenantFront(t, tenant, intercept);
      const server = await startServer({ AUTH0_DOMAIN });
      t.after(() => server.close());
      Object.assign(tenant.settings, configuredTenant("permissive", server.url));
      return await run(environment(AUTH0_DOMAIN, server.url), [option]);
    }

    test("a refused code and an encrypted machine-to-machine token point to Step 1", async (t) => {
      const report = await runWith(t, "--login", ({ url }, response, body) => {
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
      const report = await runWith(t, "--login", ({ url }, response, body) => {
        if (url !== "/oauth/token" || !body.includes("grant_type=refresh_token")) return false;
        response.writeHead(403).end(JSON.stringify({ error: "invalid_grant", error_description: "Unknown" }));
        return true;
      });
      assertMissing(report, [1, /refresh token: 403 invalid_grant: Unknown/]);
    });

    test("an error page that hides its cause is neither ok nor blamed on a step", async (t) => {
      const report = await runWith(t, "--register", ({ url = "" }, response) => {
        return url.startsWith("/authorize") && sendPage(response, 400, OOPS);
      });
      assertMissing(report);
      assert.equal(statusOf(report, /sign-in page: 400 Error Oops!.*Monitoring → Logs/), "cannot tell");
    });

    test("an error page of the tenant's own is read from its address", async (t) => {
      const said = "no connections enabled for the client";
      const report = await runWith(t, "--register", ({ url = "" }, response) => {
        if (!url.startsWith("/authorize")) return false;
        const query = new URLSearchParams({ error: "invalid_request", error_description: said });
        response.writeHead(302, { location: `https://example.com/oops?${query}` }).end();
        return true;
      });
      assertMissing(report, [3, /sign-in page: invalid_request: no connections enabled for the client/]);
    });

    test("a sign-in page behind a redirect and a cookie is found", async (t) => {
      const report = await runWith(t, "--register", ({ url = "", headers }, response) => {
        if (url.startsWith("/authorize")) {
          response.writeHead(302, { "location": "/u/login?state=1", "set-cookie": "did=1; Path=/; HttpOnly" })
            .end();
          return true;
        }
        if (!url.startsWith("/u/login")) return false;
        return headers.cookie === "did=1"
          ? sendPage(response, 200, "<h1>Log in</h1>")
          : sendPage(response, 400, OOPS);
      });
      assertMissing(report);
      assert.equal(statusOf(report, /sign-in page: opens/), "ok");
    });
  });

  describe("the command line", { concurrency: 1 }, () => {
    test("settings that are missing are named as the server names them", async () => {
      const { status, stdout, stderr } = await run({});
      assert.equal(status, 1);
      assert.equal(stdout, "");
      assert.match(stderr, /^AUTH0_DOMAIN is missing: it must be .*\nMCP_SERVER_URL is missing: it must be /);
    });
  });
});
