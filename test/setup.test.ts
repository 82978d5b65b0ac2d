/** `npm run setup`: what it says is left to do on a tenant, and that ChatGPT can be linked when it has done it. */
import assert from "node:assert/strict";
import { cp, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { main } from "./run/setup/setup.ts";
import { Connector, publishClientMetadata } from "./support/chatgpt.ts";
import { ManagementClient } from "./run/setup/management-client.ts";
import { runCommandLine, startServer } from "./support/server.ts";
import { APPLY, left, recordRequests, reset, runSetup, SERVER_URL, TOKEN } from "./run/setup/report.ts";
import {
  ALICE,
  CLIENT_KINDS,
  type ClientKind,
  configuredTenant,
  FIXED_CALLBACK_ID,
  FIXED_CLIENT,
  isStrict,
  type SettingName,
  settingsFor,
  signIn,
  startTenant,
  type Tenant,
} from "./support/tenant.ts";

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const clientDocuments = await publishClientMetadata();
after(async () => {
  await server.close();
  await clientDocuments.close();
  await tenant.close();
});

/** Step 5, which only a person can do. */
function makeApplication({ settings }: Tenant, client: ClientKind): void {
  const { applications } = configuredTenant(client.tenant, SERVER_URL, client.way);
  settings.applications.push(...applications.filter(({ clientId }) => clientId === FIXED_CLIENT.client_id));
}

describe("A new tenant", () => {
  for (const client of CLIENT_KINDS) {
    const { tenant: kind, way } = client;

    test(`${kind}, is set up by one command for the way ${way}, and ChatGPT is linked`, async (t) => {
      reset(tenant, { kind });
      const options = { way, document: clientDocuments.url() };
      const at = { serverUrl: server.url };

      const done = await runSetup(tenant, { ...options, ...APPLY }, at);
      if (way === "fixed") {
        assert.match(done.output, /Stopped at what is by hand: Step 5, application/);
        makeApplication(tenant, client);
      } else {
        assert.equal(done.status, 0, done.output);
      }
      const again = await runSetup(tenant, options, at);
      assert.deepEqual([again.status, left(again)], [0, []], again.output);

      const connector = new Connector({
        mcpServerUrl: server.url,
        browser: (url) => signIn(url, ALICE),
        oidcEnabled: !isStrict(client),
        callbackId: FIXED_CALLBACK_ID,
        ...(way === "cimd" && { clientDocuments }),
        ...(way === "fixed" && { fixedClient: FIXED_CLIENT }),
      });
      t.after(() => connector.close());
      await connector.link();
      const { structuredContent } = await connector.callTool("get_profile");
      assert.equal(structuredContent?.id, ALICE.sub);
      await connector.refresh();
    });
  }

  test("can do without issuer identification, with the document of one connection", async () => {
    reset(tenant, { kind: "strict" });
    const { status, output } = await runSetup(tenant, { document: clientDocuments.url("one"), ...APPLY });
    assert.equal(status, 0, output);
    assert.equal(tenant.settings.includeIssuerInAuthorizationResponses, false);
    assert.equal(tenant.settings.applications[0]?.externalClientId, clientDocuments.url("one"));
  });

  test("is only looked at without --apply", async () => {
    reset(tenant);
    const requests = recordRequests(tenant);
    const { status, output } = await runSetup(tenant, { way: "register" });
    assert.equal(status, 1);
    assert.match(output, /^to do {4}Step 1 {2}API: none with this Identifier → "Tasks" with RS256, .*tasks:write$/m);
    assert.match(output, /5 to do, 0 by hand\. npm run setup -- --apply does what is to do\.$/);
    assert.deepEqual(requests.filter((request) => !request.startsWith("GET ")), []);
  });

  test("is changed only when the person says yes, and says what has been done", async () => {
    reset(tenant, { kind: "strict" });
    const questions: string[] = [];
    const ask = (answer: boolean) => (question: string) => {
      questions.push(question);
      return Promise.resolve(answer);
    };
    const declined = await runSetup(tenant, { way: "register", apply: true }, { ask: ask(false) });
    assert.equal(declined.status, 1);
    assert.match(declined.output, /Nothing was changed\.$/);
    assert.deepEqual(tenant.settings.apis, []);

    const accepted = await runSetup(tenant, { way: "register", apply: true }, { ask: ask(true) });
    assert.equal(accepted.status, 0, accepted.output);
    assert.equal(accepted.lines.filter(({ mark }) => mark === "done").length, 5);
    assert.match(questions[0] ?? "", /Do what is to do, in http:\/\/localhost:\d+\/\? \[y\/N\]/);
  });

  test("is not changed where nobody can be asked", async () => {
    reset(tenant);
    const { status, output } = await runSetup(tenant, { apply: true });
    assert.equal(status, 1);
    assert.equal(output, "--apply asks first, and there is no terminal to ask on: add --yes");
  });
});

test("the environment has to be as the server takes it", async () => {
  const env = { MCP_SERVER_URL: "https://mcp.example.com/mcp/" };
  await assert.rejects(runSetup(tenant, {}, { env }), /^Error: MCP_SERVER_URL ends in a slash/);
});

test("a second run has nothing to do, and writes nothing", async () => {
  reset(tenant);
  const options = { way: "register", ...APPLY };
  await runSetup(tenant, options);
  const before = structuredClone(tenant.settings);
  const requests = recordRequests(tenant);
  const { status, output } = await runSetup(tenant, options);
  assert.equal(status, 0);
  assert.match(output, /Nothing is left to do: on to Step 7\.$/);
  assert.deepEqual(requests.filter((request) => !request.startsWith("GET ")), []);
  assert.deepEqual(tenant.settings, before);
});

describe("A setting that was left out is the only line that is not ok", () => {
  /** What is said; two are not to be seen, and the look says so. */
  const expected: Record<SettingName, (client: ClientKind) => string[]> = {
    "api": (client) => ["to do: 1 API", ...(isStrict(client) ? ["to do: 1 Default Permissions"] : [])],
    "offline-access": () => ["to do: 1 API"],
    "default-permissions": () => ["to do: 1 Default Permissions"],
    "default-audience": () => ["to do: 2 Default Audience"],
    "registration": () => ["to do: 2 Dynamic Client Registration"],
    "cimd": () => ["to do: 2 Client ID Metadata Document Registration"],
    "connection": () => ["to do: 3 connection at domain level"],
    "action": () => ["to do: 4 Action"],
    "application": () => ["by hand: 5 application"],
    "callback": () => ["by hand: 5 application"],
    "application-connection": () => [],
    "refresh-grant": () => ["by hand: 5 application"],
    "rotation": () => [],
  };

  for (const client of CLIENT_KINDS) {
    const { tenant: kind, way } = client;
    for (const leftOut of settingsFor(client)) {
      test(`${leftOut}, for ${way} on a ${kind} tenant`, async () => {
        reset(tenant, configuredTenant(kind, SERVER_URL, way, leftOut));
        tenant.settings.includeIssuerInAuthorizationResponses = true;
        if (way === "cimd") await tenant.importFromUrl(clientDocuments.url());
        const options = { way, document: clientDocuments.url() };
        const report = await runSetup(tenant, options);
        assert.deepEqual(left(report), expected[leftOut](client), report.output);
        if (left(report).some((line) => line.startsWith("by hand"))) return;
        const done = await runSetup(tenant, { ...options, ...APPLY });
        assert.equal(done.status, 0, done.output);
      });
    }
  }

  const further: Record<string, [change: (tenant: Tenant) => void, expected: string]> = {
    "the document": [({ settings }) => settings.applications = [], "to do: 2 ChatGPT's document"],
    "issuer identification": [
      ({ settings }) => settings.includeIssuerInAuthorizationResponses = false,
      "to do: 2 Include Issuer in Authorization Responses",
    ],
    "a permission": [
      ({ settings }) => settings.apis.forEach((api) => api.permissions = ["tasks:read"]),
      "to do: 1 API",
    ],
  };
  for (const [name, [change, line]] of Object.entries(further)) {
    test(`${name}, for cimd`, async () => {
      reset(tenant, configuredTenant("strict", SERVER_URL, "cimd"));
      tenant.settings.includeIssuerInAuthorizationResponses = true;
      await tenant.importFromUrl(clientDocuments.url());
      change(tenant);
      const options = { document: clientDocuments.url() };
      assert.deepEqual(left(await runSetup(tenant, { way: "cimd", ...options })), [line]);
      assert.equal((await runSetup(tenant, { way: "cimd", ...options, ...APPLY })).status, 0);
    });
  }
});

describe("Without --way it is", () => {
  const about = async (tenant: Tenant) => (await runSetup(tenant)).output.split("\n", 1)[0];

  test("cimd on a new tenant, as the README recommends", async () => {
    reset(tenant, { kind: "strict" });
    assert.equal(await about(tenant), "The tenant is strict. The way is cimd, as the README recommends.");
  });

  for (const { tenant: kind, way } of CLIENT_KINDS) {
    test(`${way} on a ${kind} tenant that is set to it`, async () => {
      reset(tenant, configuredTenant(kind, SERVER_URL, way));
      assert.equal(
        await about(tenant),
        `The tenant is ${kind}. The way is ${way}, as the tenant is set already.`,
      );
    });
  }

  test("with the document that is imported, where the tenant does not identify itself", async () => {
    reset(tenant, configuredTenant("strict", SERVER_URL, "cimd"));
    tenant.settings.applications.push({
      clientId: "tpc_1",
      externalClientId: "https://chatgpt.com/oauth/one/client.json",
      name: "ChatGPT",
      party: "strict",
      callbackUrls: ["https://chatgpt.com/connector/oauth/one"],
      grantTypes: ["authorization_code", "refresh_token"],
    });
    const report = await runSetup(tenant);
    assert.deepEqual([report.status, left(report)], [0, []], report.output);
  });
});

test("where the tenant does not say its kind, a client that registers itself gets what either kind needs", async () => {
  reset(tenant);
  tenant.beforeManagement = async (request, answer) => {
    const response = await answer();
    if (request !== "GET tenants/settings") return response;
    const { dynamic_client_registration_security_mode: _, ...rest } = Object(await response.json());
    return Response.json(rest);
  };
  const report = await runSetup(tenant, { way: "register" });
  assert.ok(left(report).includes("to do: 1 Default Permissions"), report.output);
  assert.ok(left(report).includes("to do: 4 Action"), report.output);
});

test("where the API asks for a grant, a permissive client that registers itself needs the Default Permissions", async () => {
  reset(tenant, configuredTenant("permissive", SERVER_URL));
  tenant.settings.apis.forEach((api) => api.userAccessPolicy = "require_client_grant");
  assert.deepEqual(left(await runSetup(tenant)), ["to do: 1 Default Permissions"]);
});

test("where the API asks for a grant, an application made by hand needs it", async () => {
  reset(tenant, configuredTenant("strict", SERVER_URL, "fixed"));
  tenant.settings.apis.forEach((api) => api.userAccessPolicy = "require_client_grant");
  const report = await runSetup(tenant);
  assert.deepEqual(left(report), ["by hand: 5 application"]);
  assert.match(report.output, /"ChatGPT" may not call the API\n {17}.* → APIs → User Access$/m);
  tenant.settings.applications.forEach((application) => application.userDelegatedApis = [SERVER_URL]);
  assert.equal((await runSetup(tenant)).status, 0);
});

test("the API gets the name and the permissions that tools.ts gives it", async (t) => {
  reset(tenant, { kind: "strict" });
  const directory = await mkdtemp(join(tmpdir(), "setup-"));
  t.after(() => rm(directory, { recursive: true }));
  const root = join(import.meta.dirname, "..");
  for (const file of ["auth.ts", "package.json", "test/run/setup/guide.ts"]) {
    await cp(join(root, file), join(directory, file));
  }
  await symlink(join(root, "node_modules"), join(directory, "node_modules"));
  const tools = (await readFile(join(root, "tools.ts"), "utf8")).replaceAll('"tasks:', '"notes:');
  await writeFile(join(directory, "tools.ts"), tools.replace('RESOURCE_NAME = "Tasks"', 'RESOURCE_NAME = "Notes"'));

  const guide: typeof import("./run/setup/guide.ts") = await import(
    pathToFileURL(join(directory, "test/run/setup/guide.ts")).href
  );
  const auth0 = new ManagementClient(tenant.issuer, TOKEN, () => Promise.resolve(), assert.fail);
  const { settings } = await guide.plan(auth0, { serverUrl: SERVER_URL, way: "register" });
  for (const { read } of settings.slice(0, 2)) {
    const state = await read();
    assert.match(state.status === "to do" ? state.will : "", /^("Notes" with .*, )?notes:read,? notes:write$/);
    if (state.status === "to do") await state.apply();
  }
  const [api] = tenant.settings.apis;
  assert.deepEqual(api?.permissions, ["notes:read", "notes:write"]);
  assert.deepEqual(api?.defaultPermissionsForThirdPartyApplications, ["notes:read", "notes:write"]);
});

describe("The command line", () => {
  test("--help names every option, where the token comes from, and the scopes that it needs", async () => {
    const lines: string[] = [];
    assert.equal(await main(["--help"], (text) => lines.push(text)), 0);
    const stdout = lines.join("\n");
    for (const name of ["--way", "--connection", "--document", "--apply", "--yes"]) {
      assert.ok(stdout.includes(name));
    }
    assert.match(stdout, /AUTH0_MANAGEMENT_TOKEN: Auth0 Dashboard → .* API Explorer/s);
  });

  test("sets a tenant up", async () => {
    reset(tenant, { kind: "strict" });
    const env = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: SERVER_URL, AUTH0_MANAGEMENT_TOKEN: TOKEN };
    const command = (...args: string[]) => runCommandLine("setup", args, { env }).outcome;
    const asked = await command("--way", "register", "--apply");
    assert.deepEqual([asked.status, asked.stdout.trim().split("\n").length], [1, 1]);
    const done = await command("--way", "register", "--apply", "--yes");
    assert.deepEqual([done.status, done.stderr], [0, ""]);
    assert.equal(tenant.settings.dynamicClientRegistration, true);
  });

  test("says in one line what is wrong with it", async () => {
    await assert.rejects(main(["--aply"], assert.fail), /^TypeError.*: Unknown option '--aply'[^\n]*$/);
  });
});
