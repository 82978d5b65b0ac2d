/** What `npm run setup` finds to do on a tenant, and that ChatGPT can be linked afterwards. */
import assert from "node:assert/strict";
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { pathToFileURL } from "node:url";
import { ManagementClient } from "./run/setup/management-client.ts";
import { APPLY, left, recordRequests, reset, runSetup, SERVER_URL } from "./run/setup/report.ts";
import { main, type Options } from "./run/setup/setup.ts";
import { Connector, publishClientMetadata } from "./support/chatgpt.ts";
import { copyTemplate, readTemplate, runCommandLine, startServer } from "./support/server.ts";
import { ALICE, CLIENT_KINDS, configuredTenant, FIXED_CLIENT, isStrict, settingsFor } from "./support/tenant.ts";
import { type ClientKind, type SettingName, signIn, startTenant } from "./support/tenant.ts";

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const clientDocuments = await publishClientMetadata();
after(async () => {
  await server.close();
  await clientDocuments.close();
  await tenant.close();
});

const isWrite = (request: string) => !request.startsWith("GET ");

for (const client of CLIENT_KINDS) {
  const { tenant: kind, way } = client;

  test(`setup makes all settings that ${way} on a ${kind} tenant needs, and ChatGPT can be linked`, async (t) => {
    reset(tenant, { kind });
    const options = { way, document: clientDocuments.url() };
    const at = { serverUrl: server.url };

    const done = await runSetup(tenant, { ...options, ...APPLY }, at);
    if (way === "fixed") {
      assert.match(done.output, /Stopped at what is by hand: Step 5, application/);
      const { applications } = configuredTenant(kind, SERVER_URL, way); // as Step 5 makes it
      tenant.settings.applications.push(...applications);
    } else {
      assert.equal(done.status, 0, done.output);
    }
    const again = await runSetup(tenant, options, at);
    assert.deepEqual([again.status, left(again)], [0, []], again.output);

    const connector = new Connector({
      mcpServerUrl: server.url,
      browser: (url) => signIn(url, ALICE),
      oidcEnabled: !isStrict(client),
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

test("setup leaves Include Issuer off where the document of one connection is given", async () => {
  reset(tenant, { kind: "strict" });
  const options = { way: "cimd", document: clientDocuments.url("one") };
  const { status, output } = await runSetup(tenant, { ...options, ...APPLY });
  assert.equal(status, 0, output);
  assert.equal(tenant.settings.includeIssuerInAuthorizationResponses, false);
  assert.equal(tenant.settings.applications[0]?.externalClientId, clientDocuments.url("one"));
});

test("setup changes nothing without --apply", async () => {
  reset(tenant);
  const requests = recordRequests(tenant);
  const { status, output } = await runSetup(tenant, { way: "register" });
  assert.equal(status, 1);
  assert.match(output, /^to do {4}Step 1 {3}API: none with this Identifier → "Tasks" with RS256, .*tasks:write$/m);
  assert.match(output, /5 to do, 0 by hand\. npm run setup -- --apply does what is to do\.$/);
  assert.deepEqual(requests.filter(isWrite), []);
});

test("setup changes nothing until the person says yes, and then says what it has done", async () => {
  reset(tenant, { kind: "strict" });
  const applyIf = (answer: boolean) => {
    const ask = (question: string) => {
      assert.match(question, /Do what is to do, in http:\/\/localhost:\d+\/\? \[y\/N\]/);
      return Promise.resolve(answer);
    };
    return runSetup(tenant, { way: "register", apply: true }, { ask });
  };
  const declined = await applyIf(false);
  assert.equal(declined.status, 1);
  assert.match(declined.output, /Nothing was changed\.$/);
  assert.deepEqual(tenant.settings.apis, []);

  const accepted = await applyIf(true);
  assert.equal(accepted.status, 0, accepted.output);
  assert.equal(accepted.lines.filter(({ mark }) => mark === "done").length, 5);
});

test("setup refuses invalid options, and the environment that the server refuses", async () => {
  const refusal = async (options: Options) => (await runSetup(tenant, options)).output;
  assert.equal(await refusal({ way: "dcr" }), "--way must be one of register, cimd, fixed");
  assert.equal(await refusal({ document: "client.json" }), "--document must be a URL");
  assert.match(await refusal({ apply: true }), /^--apply asks first, and there is no terminal to ask on: add --yes$/);
  const env = { MCP_SERVER_URL: "https://mcp.example.com/mcp/" };
  await assert.rejects(runSetup(tenant, {}, { env }), /^Error: MCP_SERVER_URL is .*no slash at the end/);
});

describe("A tenant configured by hand", () => {
  /** Configures the tenant as the README says, but for a setting. */
  async function configure({ tenant: kind, way }: ClientKind, leftOut?: SettingName) {
    reset(tenant, configuredTenant(kind, SERVER_URL, way, leftOut));
    if (way === "cimd") await tenant.importFromUrl(clientDocuments.url());
    return { way, document: clientDocuments.url() };
  }

  /** What setup says of each setting that was left out. It cannot see two of them. */
  const expected: Record<SettingName, (client: ClientKind) => string[]> = {
    "api": (client) => ["to do: 1 API", ...(isStrict(client) ? ["to do: 1 Default Permissions"] : [])],
    "offline-access": () => ["to do: 1 API"],
    "default-permissions": () => ["to do: 1 Default Permissions"],
    "default-audience": () => ["to do: 2 audience"],
    "registration": () => ["to do: 2b Dynamic Client Registration"],
    "include-issuer": () => ["to do: 2b Include Issuer in Authorization Responses"],
    "cimd": () => ["to do: 2b Client ID Metadata Document Registration"],
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

    test(`setup without --way has nothing to do after the README's steps for ${way} on a ${kind} tenant`, async () => {
      const { document } = await configure(client);
      const requests = recordRequests(tenant);
      const report = await runSetup(tenant, { document, ...APPLY });
      assert.deepEqual([report.status, left(report)], [0, []], report.output);
      const [about] = report.output.split("\n", 1);
      assert.equal(about, `The tenant is ${kind}. The way is ${way}, as the tenant is set already.`);
      assert.match(report.output, /Nothing is left to do: on to Step 7\.$/);
      assert.deepEqual(requests.filter(isWrite), []);
    });

    for (const leftOut of settingsFor(client)) {
      test(`setup asks for just ${leftOut} where that was left out, for ${way} on a ${kind} tenant`, async () => {
        const options = await configure(client, leftOut);
        const report = await runSetup(tenant, options);
        assert.deepEqual(left(report), expected[leftOut](client), report.output);
        if (left(report).some((line) => line.startsWith("by hand"))) return;
        const done = await runSetup(tenant, { ...options, ...APPLY });
        assert.equal(done.status, 0, done.output);
      });
    }
  }

  const FIXED: ClientKind = { tenant: "strict", way: "fixed" };
  const REGISTER: ClientKind = { tenant: "permissive", way: "register" };

  test("setup imports ChatGPT's document where that was left out", async () => {
    const options = await configure({ tenant: "strict", way: "cimd" });
    tenant.settings.applications = [];
    assert.deepEqual(left(await runSetup(tenant, options)), ["to do: 2b ChatGPT's document"]);
    assert.equal((await runSetup(tenant, { ...options, ...APPLY })).status, 0);
  });

  test("setup accepts the Default Audience, or the Compatibility Profile beside another one", async () => {
    const found = async (defaultAudience: string, resourceParameterCompatibilityProfile: boolean) => {
      const options = await configure(REGISTER);
      Object.assign(tenant.settings, { defaultAudience, resourceParameterCompatibilityProfile });
      const { output } = await runSetup(tenant, options);
      return /^ok +Step 2 +audience: (.*)$/m.exec(output)?.[1];
    };
    assert.equal(await found(SERVER_URL, false), `the Default Audience is ${SERVER_URL}`);
    assert.equal(await found("", true), "the Resource Parameter Compatibility Profile is on");
    const beside = await found("https://other.example.com/", true) ?? "";
    assert.match(beside, /^the Resource .* is on; the Default Audience is https:.* do not say which counts$/);
  });

  test("setup asks for Default Permissions on a permissive tenant, too, where the API requires a grant", async () => {
    const options = await configure(REGISTER);
    tenant.settings.apis.forEach((api) => api.userAccessPolicy = "require_client_grant");
    assert.deepEqual(left(await runSetup(tenant, options)), ["to do: 1 Default Permissions"]);
  });

  test("setup asks for the application's grant where the API requires one", async () => {
    const options = await configure(FIXED);
    tenant.settings.apis.forEach((api) => api.userAccessPolicy = "require_client_grant");
    const report = await runSetup(tenant, options);
    assert.deepEqual(left(report), ["by hand: 5 application"]);
    assert.match(report.output, /"ChatGPT" may not call the API\n {18}.* → Application Access$/m);
    tenant.settings.applications.forEach((application) => application.userDelegatedApis = [SERVER_URL]);
    assert.equal((await runSetup(tenant, options)).status, 0);
  });

  test("setup accepts one complete application for ChatGPT, whatever others lack", async () => {
    const options = await configure(FIXED);
    const { applications } = tenant.settings;
    const unfinished = {
      name: "Unfinished",
      party: "first-party" as const,
      callbackUrls: ["https://chatgpt.com/connector/oauth/one"],
      grantTypes: ["authorization_code", "refresh_token"],
    };
    applications.unshift({ clientId: "first", ...unfinished });
    applications.push({ clientId: "last", ...unfinished });
    const report = await runSetup(tenant, options);
    assert.deepEqual([report.status, left(report)], [0, []], report.output);
    assert.match(report.output, /application: "ChatGPT"; its connections/);

    tenant.settings.applications = applications.filter(({ name }) => name !== "ChatGPT");
    const { output } = await runSetup(tenant, options);
    assert.match(output, /"Unfinished" does not allow https:\/\/chatgpt\.com\/connector_platform_oauth_redirect\n/);
  });

  test("setup takes the API whose Identifier is exactly MCP_SERVER_URL, whatever Auth0 lists before it", async () => {
    const options = await configure(REGISTER);
    tenant.beforeManagement = async (request, answer) => {
      const response = await answer();
      if (request !== "GET resource-servers") return response;
      const [api] = await response.json();
      return Response.json([{ ...api, identifier: `${SERVER_URL}/`, signing_alg: "HS256" }, api]);
    };
    assert.deepEqual(left(await runSetup(tenant, options)), []);
  });
});

test("setup lists the ways, and asks to choose one, where the tenant is set to none", async () => {
  reset(tenant, { kind: "strict" });
  const { status, output } = await runSetup(tenant, APPLY);
  assert.equal(status, 1);
  const [question = "", ...ways] = output.split("\n");
  assert.match(question, /^The tenant is strict, .* Choose a way:$/);
  const named = ways.map((line) => /^ {2}npm run setup -- --way (\w+) +\S.{30}/.exec(line)?.[1]);
  assert.deepEqual(named, ["register", "cimd", "fixed"]);
  assert.deepEqual(tenant.settings.apis, []);
});

test("setup accepts the imported document of one connection where Include Issuer is off", async () => {
  reset(tenant, configuredTenant("strict", SERVER_URL, "cimd", "include-issuer"));
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

test("setup asks for what either kind of tenant needs where the tenant does not say its kind", async () => {
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

test("setup gives the API the name and the permissions of tools.ts", async (t) => {
  reset(tenant, { kind: "strict" });
  const directory = await copyTemplate(["auth.ts", "package.json", "test/run/setup/guide.ts"]);
  t.after(() => rm(directory, { recursive: true }));
  const tools = readTemplate("tools.ts").replaceAll('"tasks:', '"notes:');
  await writeFile(join(directory, "tools.ts"), tools.replace('RESOURCE_NAME = "Tasks"', 'RESOURCE_NAME = "Notes"'));

  const guide: typeof import("./run/setup/guide.ts") = await import(
    pathToFileURL(join(directory, "test/run/setup/guide.ts")).href
  );
  const token = await tenant.signManagementToken();
  const auth0 = new ManagementClient(tenant.issuer, token, () => assert.fail(), assert.fail);
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

test("npm run setup -- --help names every option, and where the token comes from", async () => {
  const lines: string[] = [];
  assert.equal(await main(["--help"], (text) => lines.push(text)), 0);
  const stdout = lines.join("\n");
  for (const name of ["--way", "--connection", "--document", "--apply", "--yes"]) assert.ok(stdout.includes(name));
  assert.match(stdout, /AUTH0_MANAGEMENT_TOKEN: Auth0 Dashboard → .* API Explorer/s);
});

test("npm run setup configures a tenant, and its exit status says whether something is left to do", async () => {
  reset(tenant, { kind: "strict" });
  const token = await tenant.signManagementToken();
  const env = { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: SERVER_URL, AUTH0_MANAGEMENT_TOKEN: token };
  const command = (...args: string[]) => runCommandLine("setup", args, { env }).outcome;
  const asked = await command("--way", "register", "--apply");
  assert.deepEqual([asked.status, asked.stdout.trim().split("\n").length], [1, 1]);
  const done = await command("--way", "register", "--apply", "--yes");
  assert.deepEqual([done.status, done.stderr], [0, ""]);
  assert.equal(tenant.settings.dynamicClientRegistration, true);
});

test("npm run setup refuses an unknown option in one line", async () => {
  await assert.rejects(main(["--aply"], assert.fail), /^TypeError.*: Unknown option '--aply'[^\n]*$/);
});
