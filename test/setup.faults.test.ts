/** `npm run setup` when Auth0 fails, refuses the token, limits the rate or quotes the token. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { type ClientDocuments, publishClientMetadata } from "./support/chatgpt.ts";
import { MANAGEMENT_SCOPES } from "./support/management.ts";
import { freePort } from "./support/server.ts";
import { APPLY, left, recordRequests, reset, runSetup, SERVER_URL, TOKEN } from "./support/setup.ts";
import { configuredTenant, startTenant, type Tenant } from "./support/tenant.ts";

let tenant: Tenant;
let clientDocuments: ClientDocuments;
before(async () => {
  tenant = await startTenant();
  clientDocuments = await publishClientMetadata();
});
after(async () => {
  await clientDocuments.close();
  await tenant.close();
});

const REGISTER = { way: "register" };
const isWrite = (request: string) => !request.startsWith("GET ");

describe("After a failure in the middle the next run goes on", () => {
  /** The request that fails: before Auth0 does what it asks, or after, so that only the answer is lost. */
  async function failAt(
    number: number,
    isDone: boolean,
    options: { way: string; document?: string },
  ): Promise<boolean> {
    let writes = 0;
    tenant.beforeManagement = async (request, answer) => {
      if (!isWrite(request) || ++writes !== number) return await answer();
      if (isDone) await answer();
      return new Response("<html>Bad Gateway</html>", {
        status: 502,
        headers: { "content-type": "text/html" },
      });
    };
    const failed = await runSetup(tenant, { ...options, ...APPLY });
    tenant.beforeManagement = (_, answer) => answer();
    if (failed.status === 0) return false; // there was no such request any more
    assert.match(failed.output, /\n(POST|PATCH) \S+: 502, and not in Auth0's words\. .*$/);
    const { status, output } = await runSetup(tenant, { ...options, ...APPLY });
    assert.equal(status, 0, output);
    return true;
  }

  for (const [kind, way, requests] of [["permissive", "register", 7], ["strict", "cimd", 7]] as const) {
    for (const isDone of [false, true]) {
      test(`${way} on a ${kind} tenant, ${isDone ? "when each answer is lost" : "when each request is refused"}`, async () => {
        const options = { way, ...(way === "cimd" && { document: clientDocuments.url() }) };
        let failures = 0;
        do {
          reset(tenant, { kind });
        } while (await failAt(++failures, isDone, options));
        assert.equal(failures - 1, requests);
        assert.equal(tenant.settings.apis.length, 1);
        assert.equal(tenant.settings.applications.length, way === "cimd" ? 1 : 0);
        assert.equal(tenant.settings.flow?.length ?? 0, way === "cimd" ? 0 : 1);
      });
    }
  }
});

describe("Auth0's errors are one line", () => {
  test("without a token: how to get one", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "" } });
    assert.equal(status, 1);
    assert.match(
      output,
      /^AUTH0_MANAGEMENT_TOKEN is missing: copy it from Auth0 Dashboard → .* API Explorer.*$/,
    );
  });

  test("a token that Auth0 refuses", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "another" } });
    assert.equal(status, 1);
    assert.equal(
      output,
      "Auth0 refuses AUTH0_MANAGEMENT_TOKEN: Invalid token. Copy a new one, as --help says",
    );
  });

  test("a scope that the token lacks is named, whichever it is", async () => {
    const unnamed = [];
    for (const scope of MANAGEMENT_SCOPES) {
      const managementTokens = { [TOKEN]: MANAGEMENT_SCOPES.filter((one) => one !== scope) };
      const outputs = [];
      for (const options of [{ way: "register" }, { way: "cimd", document: clientDocuments.url() }]) {
        reset(tenant, { kind: options.way === "cimd" ? "strict" : "permissive", managementTokens });
        // What an API has, so that there is something to change of it, too.
        if (scope === "update:resource_servers") {
          tenant.settings.apis = configuredTenant("strict", SERVER_URL, "cimd", "offline-access").apis;
        }
        const { output } = await runSetup(tenant, { ...options, ...APPLY });
        outputs.push(output);
      }
      const line = new RegExp(`^\\w+ \\S+: AUTH0_MANAGEMENT_TOKEN lacks a scope: .*${scope}`, "m");
      if (!outputs.some((output) => line.test(output))) unnamed.push(scope);
    }
    assert.deepEqual(unnamed, []);
  });

  test("a document that is refused: the other ways", async () => {
    reset(tenant, { kind: "strict" });
    const document = clientDocuments.url().replace("/oauth/client.json", "/none/oauth/client.json");
    tenant.settings.applicationLimit = 0;
    const { status, output } = await runSetup(tenant, { document, ...APPLY });
    assert.equal(status, 1);
    assert.match(
      output,
      /\nPOST clients\/cimd\/register: 403: You reached the limit .* take --way register or --way fixed$/,
    );
  });

  test("a tenant that cannot be reached", async () => {
    const origin = `http://localhost:${await freePort()}`;
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_DOMAIN: origin } });
    assert.equal(status, 1);
    assert.match(output, new RegExp(`^${origin} cannot be reached: [^\n]+$`));
  });

  test("an answer that is not Auth0's, or not as expected", async () => {
    reset(tenant);
    tenant.beforeManagement = () => Promise.resolve(new Response("<html>It works!</html>"));
    assert.match(
      (await runSetup(tenant)).output,
      /^GET tenants\/settings: 200, and not in Auth0's words\. [^\n]+$/,
    );
    tenant.beforeManagement = () => Promise.resolve(Response.json({ default_audience: 1 }));
    assert.match(
      (await runSetup(tenant)).output,
      /^GET tenants\/settings: an answer that is not expected\. [^\n]+$/,
    );
  });

  test("a change that Auth0 takes and does not make", async () => {
    reset(tenant);
    tenant.beforeManagement = (request, answer) => isWrite(request) ? Promise.resolve(Response.json({})) : answer();
    const { status, output } = await runSetup(tenant, { ...REGISTER, ...APPLY });
    assert.equal(status, 1);
    assert.match(output, /\nAPI: Auth0 took the change, and still says none with this Identifier$/);
  });

  test("--way and --document that cannot be", async () => {
    reset(tenant);
    assert.equal(
      (await runSetup(tenant, { way: "dcr" })).output,
      "--way must be one of cimd, register, fixed",
    );
    assert.equal((await runSetup(tenant, { document: "client.json" })).output, "--document must be a URL");
  });
});

describe("A limited rate is waited for", () => {
  const limit = (times: number, headers: Record<string, string>) => {
    let left = times;
    tenant.beforeManagement = (_, answer) => {
      if (left-- <= 0) return answer();
      const body = { statusCode: 429, error: "Too Many Requests", message: "Global limit has been reached" };
      return Promise.resolve(Response.json(body, { status: 429, headers }));
    };
  };

  test("as long as Auth0 says, in seconds or as a point in time", async () => {
    reset(tenant);
    limit(2, { "retry-after": "3" });
    assert.deepEqual((await runSetup(tenant, REGISTER)).waited, [3, 3]);
    limit(1, { "x-ratelimit-reset": String(Math.floor(Date.now() / 1_000) + 7) });
    const { waited: [seconds = 0], output } = await runSetup(tenant, REGISTER);
    assert.ok(seconds > 0 && seconds <= 7, `${seconds}`);
    assert.match(output, /^Auth0 limits the rate: going on in \d s\n/);
  });

  test("while nothing is done twice", async () => {
    reset(tenant);
    const requests = recordRequests(tenant);
    const record = tenant.beforeManagement;
    let turn = 0;
    tenant.beforeManagement = (request, answer) =>
      ++turn % 2 ? Promise.resolve(Response.json({ message: "Too many" }, { status: 429 })) : record(request, answer);
    assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY })).status, 0);
    assert.equal(requests.filter(isWrite).length, 7);
  });

  test("but not for ever", async () => {
    reset(tenant);
    limit(Infinity, {});
    const { status, output, waited } = await runSetup(tenant, REGISTER);
    assert.deepEqual([status, waited], [1, [1, 1, 1, 1, 1]]);
    assert.match(output, /\nGET tenants\/settings: 429: Global limit has been reached$/);
  });
});

describe("The token is never printed", () => {
  test("whoever quotes it, and terminal codes are not either", async () => {
    reset(tenant);
    tenant.settings.connections = [{ name: `\u001b[2J${TOKEN}`, domainLevel: true }];
    const { output } = await runSetup(tenant, REGISTER);
    assert.match(output, /connection at domain level: \?\[2J\(hidden\)$/m);
    assert.ok(!output.includes(TOKEN));
  });

  test("when it cannot be one", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, {}, { env: { AUTH0_MANAGEMENT_TOKEN: "two\nlines" } });
    assert.equal(status, 1);
    assert.equal(output, "AUTH0_MANAGEMENT_TOKEN is not a token: copy it whole, and nothing else");
  });
});

test("a custom domain will do, though the tenant has another", async () => {
  reset(tenant, { kind: "strict" });
  const env = { AUTH0_DOMAIN: tenant.origin.replace("localhost", "127.0.0.1") };
  assert.equal((await runSetup(tenant, { ...REGISTER, ...APPLY }, { env })).status, 0);
  assert.deepEqual(left(await runSetup(tenant, REGISTER)), []);
});
